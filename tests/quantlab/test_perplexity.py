"""Perplexity: nats per token by definition, whatever the batch, with the interval of its blocks."""

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from quantlab.config import TextConfig
from quantlab.data.text import TextBlocks, text_blocks
from quantlab.errors import CheckpointError, EvaluationError
from quantlab.evaluation.perplexity import PerplexityScores, evaluate_perplexity
from tests.toys import NUM_TOKENS, toy_model, toy_tokenizer


@cache
def blocks() -> TextBlocks:
    text = TextConfig(sequence_length=48, num_sequences=5, sampling="first")
    return text_blocks(text, toy_tokenizer(), num_embeddings=NUM_TOKENS)


def scores_of(nats: list[float], sequence_length: int) -> PerplexityScores:
    """Of blocks of a document each."""
    places = np.arange(len(nats))
    return PerplexityScores(
        np.array(nats), places, places, sequence_length, "0" * 64, "toy", "file", "1" * 64
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom"])
def test_nats_are_the_cross_entropy_of_every_token_but_the_first(name: str) -> None:
    model, text = toy_model(name, gain=2.0), blocks()
    with torch.no_grad():
        logits = model(torch.from_numpy(text.ids_NT)).logits.double()
    targets = torch.from_numpy(text.ids_NT[:, 1:, None])
    expected = -logits.log_softmax(-1)[:, :-1].gather(-1, targets).sum((1, 2)).numpy()
    found = evaluate_perplexity(model, text)
    # 47 tokens of about 7 nats; a float32 logit of about 10 is good to 1e-6.
    np.testing.assert_allclose(found.nats_N, expected, rtol=1e-6, atol=47 * 2e-6)
    summary = found.summary()
    assert summary["num_tokens"] == 5 * 47 and summary["num_blocks"] == 5 and summary["sequence_length"] == 48
    assert summary["nats_per_token"] == pytest.approx(expected.sum() / (5 * 47))
    assert summary["perplexity"] == pytest.approx(math.exp(summary["nats_per_token"]))
    low, high = summary["perplexity_interval"]
    assert low < summary["perplexity"] < high
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_digest_is_of_the_tokens_that_were_scored() -> None:
    text = blocks()
    other = replace(text, ids_NT=np.where(text.ids_NT == text.ids_NT.max(), 1, text.ids_NT))
    digests = [evaluate_perplexity(toy_model(name), each).tokens_sha256 for name, each in
               (("llama", text), ("gemma2", text), ("llama", other))]  # fmt: skip
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("batch_size", [2, 8, "auto"])
def test_no_batch_size_changes_a_score(batch_size: int) -> None:
    model, text = toy_model("llama", gain=2.0), blocks()
    done: list[int] = []
    one = evaluate_perplexity(model, text, batch_size=1)
    many = evaluate_perplexity(model, text, batch_size=batch_size, advance=done.append)
    np.testing.assert_allclose(many.nats_N, one.nats_N, rtol=1e-6, atol=47 * 2e-6)
    assert sum(done) == 5 and many.items()["item"].tolist() == [0, 1, 2, 3, 4]


def test_a_drawn_block_keeps_its_place_in_the_text() -> None:
    config = TextConfig(sequence_length=48, num_sequences=3, sampling="draw", seed=1)
    drawn = text_blocks(config, toy_tokenizer(), num_embeddings=NUM_TOKENS)
    items = evaluate_perplexity(toy_model("llama"), drawn).items()
    assert items["item"].tolist() == drawn.index_N.tolist() and items["num_tokens"].tolist() == [47] * 3


def test_the_interval_counts_documents() -> None:
    summary = scores_of([100.0, 101.0, 99.5, 100.5, 99.0, 102.0] * 2, 51).summary()
    assert (summary["num_documents"], summary["num_blocks"], summary["interval_note"]) == (12, 12, "")
    one = replace(
        scores_of([100.0, 101.0, 99.5, 100.5, 99.0, 102.0] * 2, 51), document_N=np.zeros(12, int)
    ).summary()
    assert (one["n"], one["num_blocks"], one["interval_note"]) == (1, 12, "1 document: spread hardly known")
    assert one["effective_documents"] == 1 and one["text_read_as"] == "the file as it is"
    assert scores_of([1.0, 2.0], 2).summary()["perplexity_interval"] == [None, None]


def test_a_hopeless_model_has_no_perplexity_rather_than_infinity() -> None:
    scores = scores_of([1e5, 2e5], 2)
    assert scores.summary()["perplexity"] is None and scores.summary()["nats_per_token"] == 1.5e5


def test_a_score_that_is_not_a_number_names_its_block() -> None:
    model = toy_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(EvaluationError, match="must be finite: block 0 of wikitext-2-raw test"):
        evaluate_perplexity(model, blocks())


def test_texts_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(EvaluationError, match="must fit in the model's 32 positions: the longest has 47"):
        evaluate_perplexity(toy_model("gpt2", n_positions=32), blocks())
    with pytest.raises(CheckpointError, match=r"gives id \d+, the embedding has 100 rows"):
        evaluate_perplexity(toy_model("llama", vocab_size=100), blocks())


def test_the_standard_error_of_a_perplexity_is_that_of_its_nats_to_first_order() -> None:
    """The interval of nats half as wide: (exp(x + h) - exp(x - h)) / 2h tends to exp(x)."""
    scores = scores_of([100.0, 101.0, 99.5, 100.5, 99.0, 102.0] * 2, 51)
    summary = scores.summary()
    x, h = summary["nats_per_token"], summary["nats_per_token_stderr"]
    expected = (math.exp(x + h) - math.exp(x - h)) / 2
    assert summary["perplexity_stderr"] == pytest.approx(expected, rel=h * h) and summary["n"] == 12

"""Encoding, BOS and log-likelihoods: exact splits, no second BOS, no dependence on batch or order, no silent NaN."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from quantlab.config import HellaSwagConfig
from quantlab.data.hellaswag import Document, load_documents, select
from quantlab.errors import CheckpointError, EvaluationError
from quantlab.evaluation.bos import resolve_bos
from quantlab.evaluation.encoding import Question, encode_documents
from quantlab.evaluation.loglikelihood import (
    forward_logits,
    shared_loglikelihoods,
    token_logprobs,
    unshared_loglikelihoods,
)
from tests.toys import NUM_TOKENS, toy_model, toy_tokenizer

BOS = "<|endoftext|>"


def tokenizer_with(template: str | None, bos: str | None = BOS) -> PreTrainedTokenizerFast:
    """The toy tokenizer with a template of special tokens around a text, such as "<|endoftext|> $A"."""
    tokenizer = Tokenizer.from_str(toy_tokenizer().backend_tokenizer.to_str())
    if template is not None:
        special = [(BOS, tokenizer.token_to_id(BOS))]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos)


def encoded(tokenizer: Any, documents: list[Document], bos: Any = "auto") -> list[Question]:
    return encode_documents(tokenizer, documents, resolve_bos(tokenizer, bos), num_embeddings=NUM_TOKENS)


def documents(count: int) -> list[Document]:
    return select(load_documents(), HellaSwagConfig(limit=count))


@pytest.mark.parametrize("query", ["A man", "A man ", "A man  \n", "A man.\t "])
@pytest.mark.parametrize("ending", ["sits.", " sits.", "s", "'s hat"])
def test_pairs_are_split_as_by_lm_evaluation_harness(query: str, ending: str) -> None:
    encode_pair = pytest.importorskip("lm_eval.api.model").TemplateLM._encode_pair
    tokenizer = toy_tokenizer()
    stand_in = SimpleNamespace(backend="causal", tok_encode=tokenizer.encode)
    question = encoded(tokenizer, [Document(0, query, (ending,) * 4, 0)])[0]
    context, continuation = encode_pair(stand_in, query, f" {ending}")
    assert question.context.tolist() == context
    assert question.continuations[3].tolist() == continuation


@pytest.mark.parametrize(
    ("template", "policy", "description", "num_bos"),
    [
        (None, "auto", "auto: none", 0),
        (None, "always", f"always: {BOS}", 1),
        (None, "never", "never: none", 0),
        (f"{BOS} $A", "auto", f"auto: {BOS}", 1),
        (f"{BOS} $A", "always", f"always: {BOS}", 1),
        (f"{BOS} $A", "never", "never: none", 0),
    ],
)
def test_the_bos_policy_is_detected_and_named(
    template: str | None, policy: Any, description: str, num_bos: int
) -> None:
    tokenizer = tokenizer_with(template)
    assert resolve_bos(tokenizer, policy).description == description
    plain = encoded(tokenizer_with(None), documents(2))
    for question, without in zip(encoded(tokenizer, documents(2), policy), plain, strict=True):
        assert question.context.tolist() == [0] * num_bos + without.context.tolist()
        assert [ids.tolist() for ids in question.continuations] == [
            ids.tolist() for ids in without.continuations
        ]


def test_a_second_bos_is_refused() -> None:
    twice = tokenizer_with(f"{BOS} {BOS} $A")
    for policy in ("auto", "always"):
        with pytest.raises(EvaluationError, match=r"puts '<\|endoftext\|>' 2 times before a text"):
            resolve_bos(twice, policy)
    begins = [documents(1)[0], Document(7, f"{BOS}A man", ("sits.",) * 4, 0)]
    for tokenizer, policy in ((tokenizer_with(f"{BOS} $A"), "auto"), (tokenizer_with(None), "always")):
        with pytest.raises(EvaluationError, match=r"document 7 already begins with '<\|endoftext\|>'"):
            encoded(tokenizer, begins, policy)
    # Its own BOS is the only one where none is added.
    assert encoded(tokenizer_with(None), begins)[1].context[0] == 0


def test_special_tokens_after_the_text_are_refused() -> None:
    with pytest.raises(
        EvaluationError, match=r"may stand before a text only.*encodes 'a' as a <\|endoftext\|>"
    ):
        resolve_bos(tokenizer_with(f"$A {BOS}"), "auto")


def test_a_forced_bos_needs_one() -> None:
    with pytest.raises(EvaluationError, match="needs a tokenizer with a BOS token"):
        resolve_bos(tokenizer_with(None, bos=None), "always")


def test_an_id_beyond_the_embedding_is_refused() -> None:
    policy = resolve_bos(toy_tokenizer(), "auto")
    with pytest.raises(CheckpointError, match=r"gives id \d+, the embedding has 300 rows"):
        encode_documents(toy_tokenizer(), documents(2), policy, num_embeddings=300)


def test_an_ending_without_a_token_is_refused() -> None:
    tokenizer = toy_tokenizer()
    stand_in = _CallableTokenizer(tokenizer)
    with pytest.raises(EvaluationError, match="document 3 has 1 context tokens"):
        encode_documents(
            stand_in,
            [Document(3, "a", ("b",) * 4, 0)],
            resolve_bos(tokenizer, "never"),
            num_embeddings=NUM_TOKENS,
        )


class _CallableTokenizer:
    """Encodes every text as one token, so that an ending has none of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] for _ in texts]}


def by_definition(model: torch.nn.Module, question: Question) -> list[float]:
    """Log-likelihoods from a plain forward of every whole sequence, softmax in float64."""
    sums = []
    for ids in question.continuations:
        whole = torch.from_numpy(np.concatenate([question.context, ids]))
        with torch.no_grad():
            logprobs = model(whole[None]).logits[0].double().log_softmax(-1)
        start = len(question.context)
        sums.append(sum(float(logprobs[place - 1, whole[place]]) for place in range(start, len(whole))))
    return sums


# Scores are about -450 nats; float32 carries them to 5e-5, and other orders of its sums to a few times that.
CLOSE = {"rtol": 1e-6, "atol": 2e-4}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj"])
def test_scores_follow_their_definition(name: str) -> None:
    model, some = toy_model(name, gain=3.0), encoded(toy_tokenizer(), documents(4))
    expected = [score for question in some for score in by_definition(model, question)]
    np.testing.assert_allclose(unshared_loglikelihoods(model, some), expected, **CLOSE)
    if name != "gptj":
        masks: Any = "single" if name == "llama" else "by_layer_type"
        np.testing.assert_allclose(shared_loglikelihoods(model, some, masks), expected, **CLOSE)


@pytest.mark.parametrize("batch_size", [1, 3, 8, "auto"])
@pytest.mark.parametrize("share", [True, False])
def test_no_batch_size_and_no_order_changes_a_score(batch_size: Any, share: bool) -> None:
    model, some = toy_model("llama", gain=3.0), encoded(toy_tokenizer(), documents(9))

    def score(chosen: list[Question], size: Any) -> np.ndarray:
        if share:
            found = shared_loglikelihoods(model, chosen, "single", batch_size=size)
        else:
            found = unshared_loglikelihoods(model, chosen, batch_size=size)
        return found.reshape(-1, 4)

    expected = score(some, 1)
    np.testing.assert_allclose(score(some, batch_size), expected, **CLOSE)
    np.testing.assert_allclose(score(some[::-1], batch_size)[::-1], expected, **CLOSE)


def test_sequences_are_never_padded_and_every_document_is_reported_once() -> None:
    model, some = toy_model("llama"), encoded(toy_tokenizer(), documents(9))
    seen: list[torch.Tensor] = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for share in (True, False):
        seen.clear()
        done: list[int] = []
        if share:
            shared_loglikelihoods(model, some, "single", advance=done.append)
            expected = sum(len(q.context) + sum(len(ids) - 1 for ids in q.continuations) for q in some)
        else:
            unshared_loglikelihoods(model, some, advance=done.append)
            expected = sum(len(q.context) + len(ids) - 1 for q in some for ids in q.continuations)
        assert sum(ids.numel() for ids in seen) == expected
        assert sum(done) == len(some)
    handle.remove()


def test_only_the_needed_rows_reach_the_head() -> None:
    model, some = toy_model("llama"), encoded(toy_tokenizer(), documents(3))
    rows: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    shared_loglikelihoods(model, some, "single")
    handle.remove()
    assert sum(rows) == sum(1 + sum(len(ids) - 1 for ids in q.continuations) for q in some)


def test_a_model_without_logits_to_keep_gives_the_same_rows() -> None:
    model = toy_model("llama")
    ids = np.arange(12).reshape(2, 6)

    class Plain:
        config, device, training = model.config, model.device, False

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return model(input_ids, use_cache=use_cache)

        __call__ = forward

    for keep in (3, torch.tensor([0, 4])):
        assert torch.equal(
            forward_logits(Plain(), ids, keep), forward_logits(model, ids, 6)[:, _places(keep)]
        )


def _places(keep: int | torch.Tensor) -> Any:
    return keep if isinstance(keep, torch.Tensor) else slice(-keep, None)


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 150])
def test_token_logprobs_are_log_softmax_whatever_the_rows(num_rows: int) -> None:
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(30 * generator.standard_normal((num_rows, 37))).float()
    place, target = generator.integers(num_rows, size=200), generator.integers(37, size=200)
    expected = logits.log_softmax(-1)[place, target].double().numpy()
    assert token_logprobs(logits, place, target).tolist() == expected.tolist()
    exact = logits.double().log_softmax(-1)[place, target].numpy()
    assert token_logprobs(logits.double(), place, target).tolist() == exact.tolist()


@pytest.mark.parametrize("share", [True, False])
def test_a_score_that_is_not_a_number_names_its_document(share: bool) -> None:
    model, some = toy_model("llama"), encoded(toy_tokenizer(), documents(2))
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(EvaluationError, match=r"must be finite: document \d+ got nan"):
        if share:
            shared_loglikelihoods(model, some, "single")
        else:
            unshared_loglikelihoods(model, some)


def test_models_that_cannot_read_the_sequences_are_refused() -> None:
    some = encoded(toy_tokenizer(), documents(2))
    with pytest.raises(
        EvaluationError, match=r"must fit in the model's 64 positions: the longest has \d+ tokens"
    ):
        shared_loglikelihoods(toy_model("gpt2", n_positions=64), some, "single")
    model = toy_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(EvaluationError, match="needs causal attention"):
        unshared_loglikelihoods(model, some)

"""The scores are lm-evaluation-harness's own: it runs here, offline, on the same toy model and the same documents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.hellaswag_throughput import lm_eval_samples
from quantlab.config import HellaSwagConfig
from quantlab.data.hellaswag import load_documents, select
from quantlab.evaluation.hellaswag import HellaSwagScores, evaluate_hellaswag
from tests.toys import NUM_TOKENS, toy_model, toy_tokenizer

NUM_DOCUMENTS = 64


def with_bos() -> PreTrainedTokenizerFast:
    """The toy tokenizer, with a BOS token that it adds by itself."""
    tokenizer = Tokenizer.from_str(toy_tokenizer().backend_tokenizer.to_str())
    bos = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos[0], eos_token=bos[0], pad_token=bos[0]
    )


def merging() -> PreTrainedTokenizerFast:
    """A tokenizer that knows no words: its tokens reach over the end of the context into the ending."""
    documents = select(load_documents(), HellaSwagConfig(limit=NUM_DOCUMENTS))
    texts = [f"{document.query} {ending}" for document in documents for ending in document.endings]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


@pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own; ours are errors in every other test
@pytest.mark.parametrize("make_tokenizer", [toy_tokenizer, with_bos, merging])
def test_scores_are_those_of_lm_evaluation_harness(tmp_path: Path, make_tokenizer: Any) -> None:
    model, tokenizer = toy_model("llama", gain=3.0), make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    peer = huggingface.HFLM(pretrained=str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=8)
    config = HellaSwagConfig(limit=NUM_DOCUMENTS)
    samples, totals = lm_eval_samples(peer, config, tmp_path)
    for share_context in (True, False):
        ours = evaluate_hellaswag(model, tokenizer, config, share_context=share_context)
        compare(ours, samples, totals)


def compare(ours: HellaSwagScores, samples: list[dict[str, Any]], totals: dict[str, float]) -> None:
    """The same predictions, accuracies and standard errors, and log-likelihoods within the bound."""
    theirs = np.array([[response[0][0] for response in sample["resps"]] for sample in samples])
    error = np.abs(ours.ll_N4 - theirs)
    assert (error <= 1e-4 + 1e-6 * np.abs(theirs)).all(), f"worst error {error.max():.2e} nats"
    items, summary = ours.items(), ours.summary()
    assert items["correct"].tolist() == [bool(sample["acc"]) for sample in samples]
    assert items["correct_norm"].tolist() == [bool(sample["acc_norm"]) for sample in samples]
    for name in ("acc", "acc_norm"):
        assert summary[name] == pytest.approx(totals[f"{name},none"], abs=1e-12)
        assert summary[f"{name}_stderr"] == pytest.approx(totals[f"{name}_stderr,none"], abs=1e-12)


def test_the_merging_tokenizer_merges_across_the_end_of_the_context() -> None:
    """Otherwise the comparison above would say nothing about such tokenizers."""
    tokenizer = merging()
    documents = select(load_documents(), HellaSwagConfig(limit=NUM_DOCUMENTS))
    contexts = [tokenizer(document.query)["input_ids"] for document in documents]
    wholes = [tokenizer(f"{document.query} {document.endings[0]}")["input_ids"] for document in documents]
    merged = [whole[: len(ids)] != ids for ids, whole in zip(contexts, wholes, strict=True)]
    assert sum(merged) > NUM_DOCUMENTS // 4

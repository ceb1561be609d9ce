"""Perplexity of a text: exp of the mean nats per token, over consecutive blocks without a BOS token.

The first token of a block is only read: a block of T tokens scores T - 1. Documents are the sampling units of the
interval, since blocks of one document are alike (`statistics.text_ratio`).

B: blocks in a forward pass, N: blocks, T: tokens in a block, R = T - 1, V: vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantlab import statistics
from quantlab.data.documents import CONVENTIONS, Convention
from quantlab.data.sources import digest
from quantlab.data.text import TextBlocks, check_ids
from quantlab.evaluation.encoding import Ids
from quantlab.evaluation.loglikelihood import (
    Advance,
    check_model,
    finite,
    forward_logits,
    token_budget,
    token_logprobs,
)


@dataclass(frozen=True)
class PerplexityScores:
    """Nats of every block of a text."""

    nats_N: NDArray[np.float64]
    """Minus the log-likelihood of a block's tokens but the first."""
    index_N: NDArray[np.int64]
    """Where each block stands in the text."""
    document_N: NDArray[np.int64]
    """Number of the document that holds each block's first token: the unit of intervals."""
    sequence_length: int
    """Tokens in a block."""
    text_sha256: str
    source: str
    convention: Convention
    """How the text became one string."""
    tokens_sha256: str
    """Digest of the token ids: nats per token of two models compare where it is the same."""

    def items(self) -> dict[str, NDArray[Any]]:
        """One value per block under every name."""
        num_tokens = np.full(len(self.nats_N), self.sequence_length - 1)
        return {
            "item": self.index_N,
            "document": self.document_N,
            "num_tokens": num_tokens,
            "nats": self.nats_N,
        }

    def summary(self) -> dict[str, Any]:
        """The scores with their 95% intervals, ready for JSON."""
        items = self.items()
        nats = statistics.text_ratio(items["nats"], items["num_tokens"], self.document_N)
        effective = statistics.effective_documents(items["num_tokens"], self.document_N)
        return {
            "n": nats.n,
            "num_tokens": int(items["num_tokens"].sum()),
            "num_blocks": len(self.nats_N),
            "num_documents": len(np.unique(self.document_N)),
            "effective_documents": round(effective, 2),
            **nats.summary("nats_per_token"),
            "interval_note": nats.note,
            "perplexity": _exp(nats.value),
            "perplexity_stderr": _exp_stderr(nats.value, nats.stderr),
            "perplexity_interval": [_exp(nats.low), _exp(nats.high)],
            "sequence_length": self.sequence_length,
            "bos": "never: none",
            "source": self.source,
            "text_format": self.convention,
            "text_read_as": CONVENTIONS[self.convention],
            "text_sha256": self.text_sha256,
            "tokens_sha256": self.tokens_sha256,
        }


def evaluate_perplexity(
    model: Any,
    blocks: TextBlocks,
    *,
    batch_size: int | Literal["auto"] = "auto",
    advance: Advance = lambda count: None,
) -> PerplexityScores:
    """Score every block.

    Args:
        model: a Hugging Face causal LM in eval mode.
        blocks: token ids from the model's own tokenizer.
        batch_size: blocks in one forward pass; changes no score beyond rounding.
        advance: told how many blocks were finished, as they are.

    Raises:
        EvaluationError: blocks longer than the model has positions, or a score that is not finite.
    """
    N, T = blocks.ids_NT.shape
    check_ids(blocks.ids_NT, model.get_input_embeddings().weight.shape[0])
    check_model(model, T - 1)
    size = max(1, token_budget(model) // T) if batch_size == "auto" else batch_size
    nats: list[float] = []
    for start in range(0, N, size):
        found_B = _nats(model, blocks.ids_NT[start : start + size])
        places = blocks.index_N[start : start + size]
        nats.extend(finite(found_B, [f"block {place} of {blocks.source}" for place in places]))
        advance(len(found_B))
    return PerplexityScores(
        np.array(nats),
        blocks.index_N,
        blocks.document_N,
        T,
        blocks.sha256,
        blocks.source,
        blocks.convention,
        digest(blocks.ids_NT.astype("<i8").tobytes()),
    )


def _nats(model: Any, ids_BT: Ids) -> NDArray[np.float64]:
    """Minus the log-likelihood of every row's tokens but the first."""
    B, R = len(ids_BT), ids_BT.shape[1] - 1
    logits_BRV = forward_logits(model, ids_BT[:, :-1], R)
    logprobs = token_logprobs(logits_BRV.flatten(0, 1), np.arange(B * R), ids_BT[:, 1:].flatten())
    nats_B: NDArray[np.float64] = -logprobs.reshape(B, R).sum(1)
    return nats_B


def _exp(nats: float) -> float | None:
    """exp(nats), or null where that is not a finite number."""
    return math.exp(nats) if nats < math.log(np.finfo(np.float64).max) and math.isfinite(nats) else None


def _exp_stderr(nats: float, stderr: float) -> float | None:
    """Standard error of exp(nats) to first order: exp(x) dx. Null where it is not a finite number."""
    value = _exp(nats)
    return value * stderr if value is not None and math.isfinite(stderr) else None

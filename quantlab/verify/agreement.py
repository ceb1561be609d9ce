"""A reader against our simulated model: gaps of logits and hidden states, divergence, and the same HellaSwag answers.

Gaps are absolute differences from the simulated model in float64, over all tokens of all probes. What a reader may be
off by follows from the arithmetic that it says it computes in: our own model is computed in that arithmetic too, and a
reader's largest and mean gap may be at most twice those of ours, place by place. Twice, since two right programs in one
arithmetic differ in the order of their sums alone.

P probes, T tokens, V vocabulary, D hidden size, N documents.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.data.hellaswag import NUM_ENDINGS, Document
from quantlab.verify.process import Answer
from quantlab.verify.questions import Request

__all__ = ["SLACK", "Agreement", "Flip", "Gap", "compare", "gaps"]

SLACK = 2.0
"""A reader's gap over that of plain torch in its arithmetic, at most."""
_LOGITS = "logits"
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Gap:
    """Absolute differences of one place in the model."""

    largest: float
    mean: float


@dataclass(frozen=True)
class Flip:
    """A document that the reader answers otherwise."""

    document: int
    """Its position in the file."""
    score: str
    """`acc`, or `acc_norm` (per character of the ending)."""
    ours: int
    theirs: int
    """The ending that is taken, from 0."""
    our_margin: float
    their_margin: float
    """Log-likelihood of the right ending minus that of the best wrong one, nats (per character in acc_norm)."""


@dataclass(frozen=True)
class Agreement:
    """How far a reader is from our simulated model."""

    arithmetic: str
    gaps: Mapping[str, Gap]
    """Place (`hidden 0` is the embedding's output, `hidden L` layer L's, then `logits`) -> the reader's gap."""
    allowed: Mapping[str, Gap]
    """The most that its arithmetic explains."""
    divergence: float
    """Mean KL divergence of the reader's next-token distribution from ours, nats."""
    beyond: tuple[str, ...]
    """Places whose gap is beyond what is allowed, or no number."""
    num_documents: int
    flips: tuple[Flip, ...]

    @property
    def num_same(self) -> int:
        """Documents that are answered the same under both scores."""
        return self.num_documents - len({flip.document for flip in self.flips})

    @property
    def agrees(self) -> bool:
        """Whether every gap is explained by the arithmetic."""
        return not self.beyond


def compare(
    answer: Answer,
    arithmetic: str,
    ours: Answer,
    reference: Answer,
    plain: Answer,
    request: Request,
) -> Agreement:
    """The reader's answer against the reference.

    Args:
        arithmetic: what the reader computes in.
        ours: the simulated model's in float32, whose HellaSwag answers are compared.
        reference: its probes in float64.
        plain: its probes in the reader's arithmetic.
    """
    found = gaps(answer, reference)
    allowed = {
        place: Gap(SLACK * gap.largest, SLACK * gap.mean) for place, gap in gaps(plain, reference).items()
    }
    nothing = Gap(0.0, 0.0)
    beyond = tuple(place for place, gap in found.items() if not _within(gap, allowed.get(place, nothing)))
    if not np.isfinite(answer.ll).all():
        beyond = (*beyond, "log-likelihoods")
    return Agreement(
        arithmetic,
        found,
        {place: gap for place, gap in allowed.items() if place in found},
        _divergence(answer.logits, reference.logits),
        beyond,
        len(request.documents),
        _flips(answer.ll, ours.ll, request.documents),
    )


def gaps(answer: Answer, reference: Answer) -> dict[str, Gap]:
    """Gap of each place; of a layer that only one tells, or tells in another shape, an infinite one."""
    found: dict[str, Gap] = {}
    if answer.hidden is not None and reference.hidden is not None:
        layers = zip_longest(
            zip(*answer.hidden, strict=True), zip(*reference.hidden, strict=True), fillvalue=()
        )
        found = {f"hidden {layer}": _gap(mine, theirs) for layer, (mine, theirs) in enumerate(layers)}
    return found | {_LOGITS: _gap(answer.logits, reference.logits)}


def _within(gap: Gap, most: Gap) -> bool:
    """False for what is no number, and where our own model overflows in the arithmetic: that would allow anything."""
    return gap.largest <= most.largest < math.inf and gap.mean <= most.mean


def _gap(first_PTD: Sequence[Floats], second_PTD: Sequence[Floats]) -> Gap:
    if [part.shape for part in first_PTD] != [part.shape for part in second_PTD]:
        return Gap(float("inf"), float("inf"))
    differences = np.concatenate(
        [
            np.abs(first.astype(np.float64) - second).ravel()
            for first, second in zip(first_PTD, second_PTD, strict=True)
        ]
    )
    return Gap(float(differences.max()), float(differences.mean()))


def _divergence(answer_PTV: Sequence[Floats], reference_PTV: Sequence[Floats]) -> float:
    """Mean over tokens of sum_v p (log p - log q), p the reference's; infinite where a logit is no finite number."""
    if [part.shape for part in answer_PTV] != [part.shape for part in reference_PTV]:
        return float("inf")
    if not all(np.isfinite(part).all() for part in (*answer_PTV, *reference_PTV)):
        return float("inf")
    totals = []
    for theirs, ours in zip(answer_PTV, reference_PTV, strict=True):
        log_p, log_q = _log_softmax(ours), _log_softmax(theirs)
        totals.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
    # Zero but for rounding where both are one: a divergence is not below it.
    return max(0.0, float(np.concatenate(totals).mean()))


def _log_softmax(logits_TV: Floats) -> NDArray[np.float64]:
    shifted = logits_TV.astype(np.float64) - logits_TV.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _flips(
    theirs: NDArray[np.float64], ours: NDArray[np.float64], documents: Sequence[Document]
) -> tuple[Flip, ...]:
    flips: list[Flip] = []
    chars_N4 = np.array([[len(ending) for ending in document.endings] for document in documents])
    for score, divisor_N4 in (("acc", np.ones_like(chars_N4)), ("acc_norm", chars_N4)):
        our_N4, their_N4 = (ll.reshape(-1, NUM_ENDINGS) / divisor_N4 for ll in (ours, theirs))
        for place in np.flatnonzero(our_N4.argmax(1) != their_N4.argmax(1)).tolist():
            document = documents[place]
            flips.append(
                Flip(
                    document.position,
                    score,
                    int(our_N4[place].argmax()),
                    int(their_N4[place].argmax()),
                    _margin(our_N4[place], document.label),
                    _margin(their_N4[place], document.label),
                )
            )
    return tuple(flips)


def _margin(ll_4: NDArray[Any], label: int) -> float:
    return float(ll_4[label] - np.delete(ll_4, label).max())

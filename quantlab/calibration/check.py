"""Is this text enough? Split-half stability, coverage, and overlap with the data that models are scored on.

The sequences are dealt into two halves in turn, and every statistic is taken of each half in one walk. Where a half
tells the same as the other, more text would change little. For each distinct input of linears:

    absmax_ratio            median over channels of min(a, b) / max(a, b), the absmax of the two halves
    top_overlap             share of the 10 channels of largest absmax that both halves name
    trace_difference        |tr A - tr B| / mean, of X^T X for each token
    eigenvalue_difference   median of the same over the 10 largest eigenvalues

What is asked of the median input, and why:

    MIN_RATIO 0.84          a static range off by this factor costs a quarter of a bit (2^-0.25)
    MIN_OVERLAP 0.7         7 of 10 outlier channels again; by chance it would be 10 / in_features of them
    MAX_TRACE 0.1           a scale of X^T X cancels in GPTQ and AWQ, but a tenth means that halves differ in kind
    MAX_EIGENVALUE 0.2      a direction's weight in the loss is off by a fifth
    MAX_DEAD 0.05           of a layer's channels zero on all tokens: their weights are rounded blindly
    MAX_OVERLAP 0.01        of the text's 13-grams in evaluation data: scores would measure memory (13 words as GPT-3's
                            contamination study, arXiv:2005.14165, appendix C)

and of every input: at least as many tokens as channels, else X^T X has no full rank, and at least one token.

Letters: N sequences, T tokens, I inputs of a linear.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.calibration.collect import watched_steps
from quantlab.calibration.overlap import overlaps
from quantlab.calibration.statistics import BlockStats, LinearStats
from quantlab.calibration.stream import Source, check_ids
from quantlab.errors import CalibrationError

__all__ = ["Adequacy", "InputCheck", "check_text_of", "compare"]

MIN_RATIO, MIN_OVERLAP, MAX_TRACE, MAX_EIGENVALUE, MAX_DEAD, MAX_OVERLAP = 0.84, 0.7, 0.1, 0.2, 0.05, 0.01
_TOP = 10


@dataclass(frozen=True)
class InputCheck:
    """How one input of linears fared."""

    name: str
    """The first linear that reads it."""
    num_tokens: int
    in_features: int
    num_dead: int
    """Channels that are zero on every token."""
    absmax_ratio: float
    top_overlap: float
    trace_difference: float
    eigenvalue_difference: float


@dataclass(frozen=True)
class Adequacy:
    """Whether a text is enough, and why."""

    inputs: tuple[InputCheck, ...]
    overlap: dict[str, float]
    """Share of the text's 13-grams that occur in each evaluation data set."""

    @property
    def reasons(self) -> list[str]:
        """What speaks against the text; empty where nothing does."""
        return [reason for reason in (*self._coverage(), *self._stability(), *self._overlaps()) if reason]

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.reasons:
            return f"add text: {'; '.join(self.reasons)}."
        return f"enough: both halves of the text agree on {len(self.inputs)} inputs, and all channels are covered."

    def summary(self) -> dict[str, Any]:
        """The same as JSON-ready data."""
        return {
            "verdict": self.verdict,
            "enough": not self.reasons,
            "inputs": [asdict(each) for each in self.inputs],
            "overlap": self.overlap,
        }

    def _coverage(self) -> list[str]:
        reasons = []
        if unseen := [each for each in self.inputs if not each.num_tokens]:
            reasons.append(f"no token reaches {len(unseen)} linears, the first is {unseen[0].name}")
        if short := [each for each in self.inputs if 0 < each.num_tokens < each.in_features]:
            worst = max(short, key=lambda each: each.in_features / each.num_tokens)
            reasons.append(
                f"{worst.num_tokens} tokens are fewer than the {worst.in_features} inputs of {worst.name}, so its "
                "X^T X has no full rank"
            )
        if dead := [
            each for each in self.inputs if each.num_tokens and each.num_dead > MAX_DEAD * each.in_features
        ]:
            worst = max(dead, key=lambda each: each.num_dead / each.in_features)
            reasons.append(
                f"{worst.num_dead} of the {worst.in_features} inputs of {worst.name} are always zero"
            )
        return reasons

    def _stability(self) -> list[str]:
        seen = [each for each in self.inputs if each.num_tokens]
        if not seen:
            return []
        limits: list[tuple[str, bool, float, str]] = [
            ("absmax_ratio", True, MIN_RATIO, "ranges of the two halves agree to a factor of {:.2f} only"),
            ("top_overlap", True, MIN_OVERLAP, "the two halves share {:.0%} of the largest channels only"),
            ("trace_difference", False, MAX_TRACE, "the energy of the two halves differs by {:.0%}"),
            (
                "eigenvalue_difference",
                False,
                MAX_EIGENVALUE,
                "the spectra of the two halves differ by {:.0%}",
            ),
        ]
        reasons = []
        for name, at_least, limit, sentence in limits:
            middle = median(getattr(each, name) for each in seen)
            if (middle < limit) if at_least else (middle > limit):
                reasons.append(sentence.format(middle))
        return reasons

    def _overlaps(self) -> list[str]:
        return [
            f"{share:.1%} of its 13-grams occur in {name}, which models are scored on: take another text"
            for name, share in self.overlap.items()
            if share > MAX_OVERLAP
        ]


def check_text_of(
    model: nn.Module,
    ids_NT: Tensor,
    tokenizer: Any,
    *,
    batch_size: int = 8,
    accumulate: torch.dtype = torch.float32,
    source: Source | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Adequacy:
    """Check a text for a model; arguments as `collect.collect_blocks`.

    Raises:
        CalibrationError: as `collect.collect_blocks`, or one sequence only, which has no halves.
    """
    check_ids(ids_NT)
    if len(ids_NT) < 2:
        raise CalibrationError("a check compares two halves of a text: found 1 sequence. Give at least 2.")
    dealt_NT = torch.cat([ids_NT[0::2], ids_NT[1::2]])
    half = len(ids_NT[0::2])
    parts = [(0, half), (half, len(ids_NT))]
    inputs: list[InputCheck] = []
    for step, watchers in watched_steps(
        model, dealt_NT, parts, batch_size, accumulate, source, lambda name: False, advance
    ):
        inputs += _compared(*(watcher.result(step.name) for watcher in watchers))
    return Adequacy(tuple(inputs), overlaps([tokenizer.decode(row) for row in ids_NT.tolist()]))


def _compared(first: BlockStats, second: BlockStats) -> list[InputCheck]:
    """Every distinct input of a layer, under the name of the first linear that reads it."""
    distinct: dict[int, str] = {}
    for name, stats in first.linears.items():
        distinct.setdefault(id(stats.gram_II), name)
    return [compare(name, first.linears[name], second.linears[name]) for name in distinct.values()]


def compare(name: str, first: LinearStats, second: LinearStats) -> InputCheck:
    """One input's statistics in two halves of a text."""
    a_I, b_I = first.absmax_I, second.absmax_I
    alive = (a_I > 0) | (b_I > 0)
    both_seen = bool(first.num_tokens and second.num_tokens and alive.any())
    ratio_I = a_I.minimum(b_I)[alive] / a_I.maximum(b_I)[alive]
    num_top = min(_TOP, len(a_I))
    top = [set(x_I.topk(num_top).indices.tolist()) for x_I in (a_I, b_I)]
    traces, spectra = [], []
    for stats in (first, second):
        gram_II = stats.gram_II / max(stats.num_tokens, 1)
        traces.append(gram_II.diagonal().sum(dtype=torch.float64))
        spectra.append(top_eigenvalues(gram_II))
    return InputCheck(
        name=name,
        num_tokens=first.num_tokens + second.num_tokens,
        in_features=len(a_I),
        num_dead=int((~alive).sum()),
        absmax_ratio=float(ratio_I.median()) if both_seen else 0.0,
        top_overlap=len(top[0] & top[1]) / num_top if both_seen else 0.0,
        trace_difference=float(_difference(*traces)) if both_seen else 2.0,
        eigenvalue_difference=float(_difference(*spectra).median()) if both_seen else 2.0,
    )


def top_eigenvalues(gram_II: Tensor, count: int = _TOP, rounds: int = 20) -> Tensor:
    """The largest eigenvalues, descending, float64, by subspace iteration: a few products instead of I^3.

    Iterated are count + 6 vectors; an eigenvalue well above the one that follows them is exact to rounding, the others
    to a few percent.
    Source: Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithm 4.4.
    """
    size = len(gram_II)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, min(size, count + 6), generator=generator, dtype=gram_II.dtype)
    basis = torch.linalg.qr(start)[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(gram_II @ basis)[0]
    small = (basis.T @ (gram_II @ basis)).double()
    values: Tensor = torch.linalg.eigvalsh((small + small.T) / 2).flip(0)
    return values[: min(count, size)]


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| relative to their mean; 0 where both are 0."""
    return torch.nan_to_num((a - b).abs() * 2 / (a + b).abs())

"""Measurements of a bench, what they say against the parent, and in words. No torch.

Every ratio is of one side over the parent, repeat by repeat, and its interval is Student's, at 95%, of the ratios'
logarithms: sides of one repeat ran one after another, so what slowed the machine slowed both.
Times are seconds by the clock that was asked for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from quantlab.statistics import TOO_FEW, mean

__all__ = ["BenchResult", "Ratio", "Run", "Side", "Verdict", "compare"]

Verdict = Literal["faster", "smaller", "simulated"]
"""faster: prompt or new tokens take less time than the parent's, beyond the spread. smaller: no faster, but takes less
memory while it runs. simulated: neither, so low bits can make its files smaller at most."""


@dataclass(frozen=True)
class Run:
    """What one process measured."""

    prompt_tokens: int
    new_tokens: int
    """As the engine counts them in its cache, and one more, which nothing follows."""
    load_s: float
    """From a started interpreter to a model that has answered once."""
    first_token_s: float
    """From the prompt to the logits of the first new token, when warm."""
    decode_s: float
    """From there to the logits of the last new token."""
    peak_bytes: int
    """Most memory that was resident at once, libraries and files that are mapped included."""
    libraries_bytes: int
    """What was resident before the model was loaded."""

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / self.first_token_s

    @property
    def decode_rate(self) -> float:
        """New tokens per second, without the first."""
        return (self.new_tokens - 1) / self.decode_s

    @property
    def model_bytes(self) -> int:
        """Memory at its peak beyond the libraries."""
        return max(1, self.peak_bytes - self.libraries_bytes)


MEASURES: dict[str, Callable[[Run], float]] = {
    "prefill_rate": lambda run: run.prefill_rate,
    "decode_rate": lambda run: run.decode_rate,
    "first_token_s": lambda run: run.first_token_s,
    "load_s": lambda run: run.load_s,
    "peak_bytes": lambda run: run.peak_bytes,
    "model_bytes": lambda run: run.model_bytes,
}
"""What a side is summed up by."""


@dataclass(frozen=True)
class Ratio:
    """One measure over the parent's: geometric mean and 95% interval over repeats, [0, inf] of too few of them."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        """Of measures of the same repeats."""
        logs = mean([math.log(a / b) for a, b in zip(ours, theirs, strict=True)])
        return cls(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high))


@dataclass(frozen=True)
class Side:
    """One engine on one checkpoint."""

    name: str
    """The engine, or `parent`."""
    arithmetic: str
    """What it computes in, as the engine says."""
    runs: tuple[Run, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    error: str = ""
    """Why there are no measurements, in a sentence."""

    def spread(self, measure: str) -> tuple[float, float, float]:
        """Median, least and largest over repeats."""
        values = [MEASURES[measure](run) for run in self.runs]
        return median(values), min(values), max(values)

    def summary(self) -> dict[str, Any]:
        """As JSON takes it."""
        head = {"name": self.name, "arithmetic": self.arithmetic, "versions": dict(self.versions)}
        if self.error:
            return head | {"error": self.error}
        spreads = {
            name: dict(zip(("median", "least", "most"), self.spread(name), strict=True)) for name in MEASURES
        }
        return head | spreads | {"runs": [asdict(run) for run in self.runs]}


@dataclass(frozen=True)
class Comparison:
    """One engine's runs against the parent's."""

    engine: str
    prefill: Ratio
    """Times as many tokens of a prompt per second."""
    decode: Ratio
    """Times as many new tokens per second."""
    memory: Ratio
    """Times as much memory beyond the libraries."""
    verdict: Verdict

    @property
    def sentence(self) -> str:
        """The verdict with its numbers."""
        speeds = (
            f"new tokens {_times(self.decode)}, prompt {_times(self.prefill)}, memory {_times(self.memory)}"
        )
        said = {
            "faster": f"faster here at {self._where()}",
            "smaller": "only smaller here: it takes less memory, and is not faster",
            "simulated": "simulated here: neither faster nor smaller in memory",
        }
        return f"{self.engine} is {said[self.verdict]} ({speeds} of the parent's)."

    def _where(self) -> str:
        names = {"new tokens": self.decode, "prompts": self.prefill}
        return " and ".join(name for name, ratio in names.items() if ratio.low > 1)


def compare(side: Side, parent: Side) -> Comparison:
    """What the measurements of both say; they have as many repeats."""
    ratios = [
        Ratio.of([MEASURES[name](run) for run in side.runs], [MEASURES[name](run) for run in parent.runs])
        for name in ("prefill_rate", "decode_rate", "model_bytes")
    ]
    prefill, decode, memory = ratios
    verdict: Verdict = "simulated"
    if prefill.low > 1 or decode.low > 1:
        verdict = "faster"
    elif memory.high < 1:
        verdict = "smaller"
    return Comparison(side.name, prefill, decode, memory, verdict)


@dataclass(frozen=True)
class BenchResult:
    """A folder's engines, and its parent where there is one."""

    folder: str
    weights_bytes: int
    """Of its weight files."""
    sides: tuple[Side, ...]
    parent: Side | None
    parent_name: str = ""
    parent_weights_bytes: int = 0
    notes: tuple[str, ...] = ()
    """What was not done, in sentences."""
    settings: tuple[tuple[str, int | str], ...] = ()
    """Tokens, repeats, threads and clock."""
    cpu: str = "an unnamed CPU"
    """Its name and instruction sets."""

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Of every engine that ran, against a parent that ran."""
        if self.parent is None or self.parent.error:
            return ()
        return tuple(compare(side, self.parent) for side in self.sides if not side.error)

    def summary(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "folder": self.folder,
            "weights_bytes": self.weights_bytes,
            "parent": None
            if self.parent is None
            else {"checkpoint": self.parent_name, "weights_bytes": self.parent_weights_bytes}
            | self.parent.summary(),
            "engines": [side.summary() for side in self.sides],
            "comparisons": [asdict(one) | {"sentence": one.sentence} for one in self.comparisons],
            "settings": dict(self.settings),
            "cpu": self.cpu,
            "notes": list(self.notes),
        }


def _times(ratio: Ratio) -> str:
    ends = f"{ratio.low:.2f}, {ratio.high:.2f}" if math.isfinite(ratio.high) else f"{TOO_FEW} repeats"
    return f"{ratio.value:.2f} [{ends}] times"

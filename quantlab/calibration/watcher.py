"""Watcher: what is seen of one decoder layer while text runs through it.

Linears that read one tensor (q, k, v; gate, up) are seen as such and share one Gram matrix, so there is one for each
distinct input. Which tensor a linear read is told by identity, so no family needs to be known.

Letters: I inputs of a linear.
"""

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.calibration.accumulators import InputSums, RangeSums, unseen
from quantlab.calibration.statistics import AttentionStats, BlockStats
from quantlab.calibration.stream import BlockStep
from quantlab.errors import CalibrationError

__all__ = ["SITES", "Watcher"]

SITES = ("attn_query", "attn_key", "attn_value")
"""What enters the attention product, in the order of AttentionStats."""


class Watcher:
    """What is seen of one layer's linears and attention."""

    def __init__(
        self, step: BlockStep, linears: Sequence[str], attention: Sequence[str], accumulate: torch.dtype
    ) -> None:
        inside = f"{step.name}."
        self.layer, self.accumulate = step.layer, accumulate
        self.linears = [name.removeprefix(inside) for name in linears if name.startswith(inside)]
        self.inside = inside
        self._sums: dict[str, InputSums] = {}
        self._latest: dict[InputSums, _Seen] = {}
        self._calls: Counter[str] = Counter()
        self._ranges = {
            f"{name}.{site}".removeprefix(inside): RangeSums(f"{name}.{site}")
            for name in attention
            if name.startswith(inside)
            for site in SITES
        }

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Take one call of a linear or of a site."""
        if name in self._ranges:
            self._ranges[name].add(args[0])
        else:
            # Statistics are of what meets the weights: a rotated linear rotates its inputs first.
            before = getattr(module, "before", None)
            self._see_linear(name, args[0] if before is None else before(args[0]))

    def _see_linear(self, name: str, x: Tensor) -> None:
        self._calls[name] += 1
        shared = next((sums for sums, seen in self._latest.items() if seen.is_still(x)), None)
        if name not in self._sums:
            self._sums[name] = shared or InputSums(self.inside + name, x.shape[-1], self.accumulate, x.device)
        sums = self._sums[name]
        if sums.name == self.inside + name:
            sums.add(x)
            self._latest[sums] = _Seen(x)
        elif sums is not shared:
            raise self._shared_in_part(name)

    def _shared_in_part(self, name: str) -> CalibrationError:
        """Sums of two linears that turn out to differ cannot be told apart any more."""
        return CalibrationError(
            f"linears that read one tensor must do so in every call, to share its X^T X: {self.inside}{name} and "
            f"{self._sums[name].name} read one in some calls only. This architecture cannot be calibrated."
        )

    def result(self, name: str) -> BlockStats:
        """The layer's statistics; what was summed is used up.

        Raises:
            CalibrationError: X^T X overflows, or linears shared their inputs in some calls only.
        """
        for each, known in self._sums.items():
            if self._calls[each] != self._calls[known.name.removeprefix(self.inside)]:
                raise self._shared_in_part(each)
        results = {sums: sums.result() for sums in self._sums.values()}
        linears = {}
        for each in self.linears:
            sums = self._sums.get(each)
            linears[self.inside + each] = (
                results[sums] if sums else unseen(_inputs(self.layer.get_submodule(each)), self.accumulate)
            )
        # A layer whose attention did not reach its sites is left out.
        attention = {
            self.inside + each: AttentionStats(*(self._ranges[f"{each}.{site}"].result() for site in SITES))
            for each in dict.fromkeys(place.rpartition(".")[0] for place in self._ranges)
            if all(self._ranges[f"{each}.{site}"].has_seen for site in SITES)
        }
        return BlockStats(name, linears, attention)

    @property
    def places(self) -> list[str]:
        """Names within the layer of all that is watched."""
        return [*self.linears, *self._ranges]


class _Seen:
    """A tensor that was read, told from others by identity: one that is gone or was changed in place is none of them.

    A view of it is another tensor. Tensors of inference mode do not tell when they are changed, so they are never
    taken for one that was seen.
    """

    def __init__(self, x: Tensor) -> None:
        self.tensor = weakref.ref(x)
        self.version = None if x.is_inference() else x._version

    def is_still(self, x: Tensor) -> bool:
        """Whether x is this tensor, with the values that it had."""
        return self.tensor() is x and self.version is not None and self.version == x._version


def _inputs(linear: nn.Module) -> int:
    """in_features of a linear or of GPT-2's Conv1D."""
    return int(getattr(linear, "in_features", None) or linear.nx)  # type: ignore[arg-type]

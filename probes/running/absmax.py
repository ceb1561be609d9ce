"""The largest magnitude of a stream: of the tensor, of each channel, of each head."""

from typing import Any

import torch
from torch import Tensor


class AbsMax:
    """The largest finite |x| along one axis of every tensor added, or of the whole tensor.

    Args:
        axis: which axis is kept: -1 for channels of [..., D], 1 for heads of [B, H, q, t]; None keeps none.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self._largest: Tensor | None = None

    def add(self, x: Tensor, visible: Tensor | None = None) -> None:
        """Take in a tensor of any shape; `visible`, bool, broadcastable, leaves the rest of it out."""
        x = x.detach().abs()
        if visible is not None:
            x = x.masked_fill(~visible, 0.0)
        largest = self._reduce(x)
        if not bool((largest < torch.inf).all()):
            largest = self._reduce(x.masked_fill(~(x < torch.inf), 0.0))
        self._take(largest.double().cpu())

    def merge(self, other: "AbsMax") -> None:
        """Take in what another has seen."""
        assert self.axis == other.axis
        if other._largest is not None:
            self._take(other._largest)

    def value(self) -> Tensor:
        """float64, one entry per place of the axis, or a scalar; empty when nothing was added."""
        return torch.zeros(0, dtype=torch.float64) if self._largest is None else self._largest

    def state_dict(self) -> dict[str, Any]:
        return {"largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._largest = state["largest"]

    def _reduce(self, x: Tensor) -> Tensor:
        if self.axis is None:
            return x.amax() if x.numel() else x.new_zeros(())
        others = [axis for axis in range(x.ndim) if axis != self.axis % x.ndim]
        return x.amax(others) if others else x

    def _take(self, largest: Tensor) -> None:
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

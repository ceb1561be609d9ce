"""Running sums of calibration: X^T X of a linear's inputs, extremes of an attention layer's tensors.

X^T X is symmetric, so only blocks on and below its diagonal are summed, and mirrored at the end: about half the work.

Letters: M tokens of one call, I inputs of a linear; B sequences, H heads, T tokens, C channels of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from quantlab.calibration.statistics import LinearStats, Ranges
from quantlab.errors import CalibrationError

__all__ = ["InputSums", "RangeSums"]

_ROWS = 256
"""Rows of a block of X^T X: small blocks waste less work on the diagonal, large ones run faster."""


class InputSums:
    """Sums over the inputs of one linear, or of several that read one tensor."""

    def __init__(self, name: str, in_features: int, accumulate: torch.dtype, device: torch.device) -> None:
        self.name = name
        """The first linear that reads it, for messages."""
        self.gram_II = torch.zeros(in_features, in_features, dtype=accumulate, device=device)
        self.minimum_I = torch.full((in_features,), torch.inf, device=device)
        self.maximum_I = torch.full((in_features,), -torch.inf, device=device)
        self.total_I = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Take the inputs [..., I] of one call.

        Raises:
            CalibrationError: NaN or Inf among them.
        """
        x_MI = x.detach().reshape(-1, x.shape[-1])
        if not len(x_MI):
            return
        # Not aminmax, which takes five times as long as both.
        low_I, high_I = x_MI.amin(0).float(), x_MI.amax(0).float()
        # The extremes carry NaN along.
        if not bool(torch.isfinite(low_I).all() & torch.isfinite(high_I).all()):
            bad = (~torch.isfinite(x_MI)).nonzero()
            raise CalibrationError(
                f"activations must be finite: the input of {self.name} holds {len(bad)} NaN or Inf among "
                f"{x_MI.numel()} values, the first in channel {int(bad[0, 1])}. Use a wider dtype (--dtype float32), "
                "or check the weights before it."
            )
        self.minimum_I, self.maximum_I = self.minimum_I.minimum(low_I), self.maximum_I.maximum(high_I)
        # Pairwise within a call, which is as exact as float32 gets and a tenth of the time of a sum in float64.
        self.total_I += x_MI.sum(0, dtype=self.gram_II.dtype)
        self.num_tokens += len(x_MI)
        with _full_precision():
            wide_MI = x_MI.to(self.gram_II.dtype)
            for start, stop in _blocks(len(self.gram_II)):
                self.gram_II[start:stop, :stop].addmm_(wide_MI[:, start:stop].T, wide_MI[:, :stop])

    def result(self) -> LinearStats:
        """The statistics, on the CPU; these sums are used up.

        Raises:
            CalibrationError: X^T X overflows its dtype.
        """
        if not bool(torch.isfinite(self.gram_II.diagonal()).all()):
            raise CalibrationError(
                f"X^T X must fit its dtype: inputs of {self.name} reach {float(self.absmax):.3g}, whose squares "
                f"overflow {str(self.gram_II.dtype).removeprefix('torch.')}. Set calibration.accumulate=float64."
            )
        for start, stop in _blocks(len(self.gram_II)):
            square = self.gram_II[start:stop, start:stop]
            square.copy_((square + square.T) / 2)
            self.gram_II[:start, start:stop] = self.gram_II[start:stop, :start].T
        return LinearStats(
            gram_II=self.gram_II.cpu(),
            minimum_I=self.minimum_I.cpu(),
            maximum_I=self.maximum_I.cpu(),
            mean_I=(self.total_I / self.num_tokens).float().cpu(),
            num_tokens=self.num_tokens,
        )

    @property
    def absmax(self) -> Tensor:
        """The largest magnitude of all channels."""
        return self.minimum_I.abs().maximum(self.maximum_I.abs()).max()


class RangeSums:
    """Extremes of each channel of each head."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.minimum_HC: Tensor | None = None
        self.maximum_HC: Tensor | None = None

    def add(self, x_BHTC: Tensor) -> None:
        """Take one call.

        Raises:
            CalibrationError: NaN or Inf.
        """
        low_HC, high_HC = x_BHTC.amin((0, 2)).float(), x_BHTC.amax((0, 2)).float()
        if not bool(torch.isfinite(low_HC).all() & torch.isfinite(high_HC).all()):
            raise CalibrationError(
                f"activations must be finite: {self.name} holds NaN or Inf. Use a wider dtype (--dtype float32), or "
                "check the weights before it."
            )
        self.minimum_HC = low_HC if self.minimum_HC is None else self.minimum_HC.minimum(low_HC)
        self.maximum_HC = high_HC if self.maximum_HC is None else self.maximum_HC.maximum(high_HC)

    @property
    def has_seen(self) -> bool:
        """Whether there was a call."""
        return self.minimum_HC is not None

    def result(self) -> Ranges:
        """The extremes, on the CPU."""
        assert self.minimum_HC is not None and self.maximum_HC is not None
        return Ranges(self.minimum_HC.cpu(), self.maximum_HC.cpu())


def unseen(in_features: int, accumulate: torch.dtype) -> LinearStats:
    """Statistics of a linear that no token reached: all zero."""
    zeros = torch.zeros(in_features)
    gram = torch.zeros(in_features, in_features, dtype=accumulate)
    return LinearStats(gram, zeros, zeros.clone(), zeros.clone(), 0)


def _blocks(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + _ROWS, size)) for start in range(0, size, _ROWS)]


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32, whatever the process allows elsewhere (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

"""What calibration knows of a linear's inputs and of attention's queries, keys and values; of a layer, and of a model.

N: sequences, T: tokens; I: input channels of a linear; H: heads, C: channels of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AttentionStats", "BlockStats", "Calibration", "LinearStats", "Ranges"]


@dataclass(frozen=True)
class LinearStats:
    """Statistics of one linear's inputs x over all calibration tokens."""

    gram_II: Tensor
    """Sum over tokens of x x^T, [I, I], float32 or float64; linears that read one tensor share one Gram matrix."""
    minimum_I: Tensor
    """Smallest value of each channel, float32."""
    maximum_I: Tensor
    """Largest value of each channel, float32."""
    mean_I: Tensor
    """Mean of each channel, float32."""
    num_tokens: int
    """Tokens that were seen; a layer's expert may see fewer than its neighbours."""

    @property
    def absmax_I(self) -> Tensor:
        """Largest magnitude of each channel, float32."""
        return self.minimum_I.abs().maximum(self.maximum_I.abs())

    def to(self, device: torch.device) -> "LinearStats":
        """The same on a device; itself where it is there already."""
        if self.gram_II.device == device:
            return self
        low, high, mean = (x.to(device) for x in (self.minimum_I, self.maximum_I, self.mean_I))
        return LinearStats(self.gram_II.to(device), low, high, mean, self.num_tokens)

    def divided(self, scales_I: Tensor) -> "LinearStats":
        """Statistics of the inputs x / scales, as after folding `scales_I` (positive, [I]) into what makes them.

        X^T X becomes X^T X / (s_i s_j), dtype kept; linears that share one Gram matrix share the result's too where
        one call makes it for them all.
        """
        assert bool((scales_I > 0).all()), "scales must be positive"
        scales = scales_I.to(self.gram_II.dtype)
        return LinearStats(
            gram_II=self.gram_II / scales.unsqueeze(-1) / scales,
            minimum_I=self.minimum_I / scales_I,
            maximum_I=self.maximum_I / scales_I,
            mean_I=self.mean_I / scales_I,
            num_tokens=self.num_tokens,
        )


@dataclass(frozen=True)
class Ranges:
    """Extremes of each channel of each head."""

    minimum_HC: Tensor
    """float32."""
    maximum_HC: Tensor
    """float32."""


@dataclass(frozen=True)
class AttentionStats:
    """What enters one layer's attention product, after rotary embedding."""

    query: Ranges
    key: Ranges
    value: Ranges


@dataclass(frozen=True)
class BlockStats:
    """Statistics of one decoder layer."""

    name: str
    linears: Mapping[str, LinearStats]
    """By the linear's dotted name; one that no token reached has num_tokens 0."""
    attention: Mapping[str, AttentionStats]
    """By the attention layer's dotted name; empty where its attention has no sites."""


@dataclass(frozen=True)
class Calibration:
    """Statistics of a whole model."""

    ids_NT: Tensor
    """The tokens that were seen, int64."""
    linears: Mapping[str, LinearStats]
    """By the linear's dotted name; those of a cache are read when they are asked for."""
    attention: Mapping[str, AttentionStats]
    """By the attention layer's dotted name; empty where its attention has no sites."""
    key: str = ""
    """Hash of what made it, where it was stored."""

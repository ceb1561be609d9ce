"""What methods need of calibration: checked, and brought to units in which float32 neither overflows nor vanishes."""

from torch import Tensor

from quantlab.calibration.statistics import LinearStats
from quantlab.errors import SchemeError

__all__ = ["UNSEEN", "gram_of", "second_moments", "shortage", "unit_gram"]

UNSEEN = "rtn: every input was 0 in calibration, or no token reached this layer"
"""Note of a method that had nothing to go by: its codes are the nearest on full ranges."""


def gram_of(method: str, weight_OI: Tensor, stats: LinearStats | None) -> tuple[Tensor, str]:
    """X^T X as it is, [I, I], once it is known to be there, of this matrix's inputs, and finite; a note of its lack.

    Raises:
        SchemeError: no statistics, of another width, or not finite.
    """
    if stats is None:
        raise SchemeError(
            f"{method} needs calibration statistics: found none for a matrix of shape {tuple(weight_OI.shape)}. "
            "Calibrate first, or take a method without data: rtn, clip, hqq."
        )
    gram_II = stats.gram_II
    if gram_II.shape[0] != weight_OI.shape[1]:
        raise SchemeError(
            f"statistics must be of the layer's own inputs: found X^T X of {gram_II.shape[0]} channels for a matrix "
            f"of shape {tuple(weight_OI.shape)}. Calibrate this checkpoint again."
        )
    if not bool(gram_II.isfinite().all()):
        # One such input spoils its own row and column, and one place of every other.
        channel = int((~gram_II.isfinite()).sum(0).argmax())
        raise SchemeError(
            f"X^T X must be finite: found NaN or infinity at input channel {channel} of {gram_II.shape[0]}. Look for "
            "the first layer with such activations (quantlab profile), or calibrate in float32."
        )
    if gram_II.diagonal().max() <= 0:
        return gram_II, UNSEEN
    return gram_II, shortage(method, stats.num_tokens, len(gram_II))


def shortage(method: str, num_tokens: int, in_features: int) -> str:
    """Note of inputs that are fewer than their channels, so that directions are unseen; empty where they are not."""
    if num_tokens >= in_features:
        return ""
    return f"{method}: {num_tokens} tokens for {in_features} input channels: rank-deficient"


def second_moments(method: str, weight_OI: Tensor, stats: LinearStats | None) -> tuple[Tensor, str]:
    """diag(X^T X) over its largest value, [I] float32, and the note of `gram_of`. Raises as that."""
    gram_II, note = unit_gram(method, weight_OI, stats)
    return gram_II.diagonal(), note


def unit_gram(method: str, weight_OI: Tensor, stats: LinearStats | None) -> tuple[Tensor, str]:
    """X^T X over its largest diagonal value, [I, I] float32, and the note of `gram_of`. Raises as that."""
    gram_II, note = gram_of(method, weight_OI, stats)
    largest = gram_II.diagonal().max()
    return (gram_II / largest if largest > 0 else gram_II).float(), note

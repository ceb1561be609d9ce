"""Settings of the transforms; defaults live here and nowhere else."""

from typing import Literal

from pydantic import Field

from quantlab.sections import Section

__all__ = ["TransformConfig"]


class TransformConfig(Section):
    """How the function-preserving transforms are made and checked."""

    smooth_alpha: float = Field(0.5, ge=0, le=1)
    """How far outliers move from activations to weights: 0 not at all, 1 entirely."""
    rotate_parts: tuple[Literal["residual", "values", "heads", "down"], ...] = (
        "residual",
        "values",
        "heads",
        "down",
    )
    """What is rotated: the residual stream and value heads, within the weights; inputs of attention's output projection
    across its heads, and of the FFN's last linear, as they arrive."""
    rotate_seed: int = Field(0, ge=0)
    """Seed of the rotations' random signs."""
    spin_bits: int = Field(4, ge=2, le=8)
    """Width of inputs and weights in the rounded model whose divergence the learned rotation lowers."""
    spin_weights: bool = True
    """Whether its weights are rounded, to nearest; false suits methods that fit codes to inputs, such as gptq."""
    spin_steps: int = Field(30, ge=1)
    """Steps of gradient descent over rotations, each a forward and a backward pass through the whole model."""
    spin_learning_rate: float = Field(0.03, gt=0)
    """Size of the first step, about the angle in radians by which a direction turns; falls to 0 linearly."""
    spin_batch_size: int = Field(2, ge=1)
    """Sequences in a step."""
    spin_sequences: int = Field(64, ge=2)
    """Calibration sequences; one of eight judges and is not learned from."""
    guard_sequences: int = Field(2, ge=1)
    """Sequences on which the logits before and after a transform are compared."""
    guard_tokens: int = Field(256, ge=1)
    """Tokens of each of them."""

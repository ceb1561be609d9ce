"""Settings of the transforms; defaults live here and nowhere else."""

from pydantic import Field

from quantlab.sections import Section

__all__ = ["TransformConfig"]


class TransformConfig(Section):
    """Every transform's settings."""

    smoothing: float = Field(0.5, ge=0, le=1)
    """SmoothQuant's alpha: how much of an input channel's range moves into the weights."""
    seed: int = Field(0, ge=0)
    """Seed of random rotations."""
    spin_steps: int = Field(100, ge=1)
    """Steps of the descent that learns the rotation of the residual stream."""
    spin_learning_rate: float = Field(0.1, gt=0)
    """Its first step size; falls linearly to 0."""
    num_sequences: int = Field(2, ge=1)
    """Calibration sequences on which the function is compared before and after each transform."""

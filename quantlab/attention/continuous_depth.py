"""continuous_depth: attention of the one decoder block that `models/continuous.py` integrates over depth as an ODE.

The attention is standard; the options say how depth is walked.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantlab.attention.base import HeadCounts
from quantlab.attention.options import VariantOptions, one_of
from quantlab.attention.standard import StandardAttention
from quantlab.errors import ConfigError
from quantlab.inspection.layers import ADAPTIVE

if TYPE_CHECKING:
    from quantlab.models.configuration import QuantlabConfig

EVALUATIONS_PER_STEP = {"euler": 1, "rk4": 4}
"""Evaluations of the block in a step of each solver with fixed steps."""


@dataclass(frozen=True)
class DepthOptions(VariantOptions):
    """The solver, and the depth that it walks."""

    solver: str = "euler"
    """`euler` or `rk4` with fixed steps, num_hidden_layers evaluations in all; or `dopri5`, which chooses its steps."""
    span: float = 0.0
    """Depth that is integrated over, in blocks; 0 for num_hidden_layers, where a step of euler is one block."""
    tolerance: float = 1e-3
    """Of dopri5, for each step: root mean square of the error over tolerance (1 + |h|), at most 1."""
    conditioned: bool = True
    """Whether the block knows its depth: a learned scale and shift of each norm's output, linear in depth."""
    adjoint: bool = False
    """Gradients by the adjoint ODE: memory of one block instead of one an evaluation."""

    def __post_init__(self) -> None:
        one_of("solver", self.solver, (*EVALUATIONS_PER_STEP, *ADAPTIVE))
        if not 0 <= self.span < float("inf"):
            raise ConfigError(f"span must be 0 or a finite number of blocks above it: found {self.span}.")
        if not 0 < self.tolerance < float("inf"):
            raise ConfigError(f"tolerance must be above 0 and finite: found {self.tolerance}.")

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver chooses its steps."""
        return self.solver in ADAPTIVE

    @property
    def has_cache(self) -> bool:
        """With fixed steps only: an adaptive solver's evaluations differ between calls, so no keys can be kept."""
        return not self.is_adaptive


class ContinuousDepthAttention(StandardAttention):
    """Standard attention; an evaluation of the block has its own, with the block's projections."""

    options: DepthOptions

    @staticmethod
    def count_heads(config: "QuantlabConfig") -> HeadCounts:
        """Standard attention's; the evaluations must make whole steps."""
        options = config.options
        assert isinstance(options, DepthOptions)
        per_step = EVALUATIONS_PER_STEP.get(options.solver, 1)
        if config.num_hidden_layers % per_step:
            raise ConfigError(
                f"num_hidden_layers counts evaluations of the block and must be a multiple of {per_step} with "
                f"solver={options.solver!r}: found {config.num_hidden_layers}."
            )
        return StandardAttention.count_heads(config)

"""Settings of the weight methods; defaults live here and nowhere else."""

from typing import Literal

from pydantic import Field

from quantlab.sections import Section

__all__ = ["AutoRoundConfig", "AwqConfig", "GptqConfig", "HqqConfig", "MethodConfig"]


class GptqConfig(Section):
    """GPTQ's solver."""

    act_order: bool = True
    """Quantize input channels in the order of falling second moment."""
    static_groups: bool = True
    """Scales of groups are fixed before the first column, so that act-order leaves groups whole and needs no g_idx."""
    block_size: int = Field(128, ge=1)
    """Columns whose errors are fed back before the rest of the matrix is updated."""
    clip_steps: int = Field(12, ge=1)
    """Ranges that are tried for every group, from the one that covers it down; 1 keeps that one, as the paper does."""
    damping: float = Field(0.01, gt=0, le=1)
    """Part of the mean diagonal of X^T X that is added to it; raised step by step where the matrix is singular."""


class AwqConfig(Section):
    """AWQ's search."""

    num_steps: int = Field(20, ge=2)
    """Grid points of the exponent of the scales, from 0 up to 1, in each of two families."""
    clip: bool = True
    """Search a shrunk range of every group after scaling."""


class HqqConfig(Section):
    """HQQ's half-quadratic solver."""

    num_steps: int = Field(20, ge=1)
    """Iterations from each start; every group keeps the best zero point that it met."""
    norm: float = Field(0.7, gt=0, le=1)
    """Exponent of the sparsity-promoting norm of the error."""


class AutoRoundConfig(Section):
    """AutoRound's signed gradient descent."""

    num_steps: int = Field(200, ge=1)
    """Steps for each decoder layer."""
    batch_size: int = Field(8, ge=1)
    """Sequences in a step."""
    learning_rate: float | None = Field(None, gt=0)
    """Step of the rounding offsets; none means 1 / num_steps."""
    seed: int = Field(0, ge=0)
    """Seed of the order of sequences."""


class MethodConfig(Section):
    """Every method's settings."""

    hessian: Literal["shared", "sequential"] = "shared"
    """shared: X^T X of the 16-bit model serves every scheme; sequential: each layer sees inputs that come out of
    quantized layers, which is one calibration a scheme. AWQ searches its scales on the 16-bit model either way; only
    its ranges follow."""
    gptq: GptqConfig = GptqConfig()
    """GPTQ."""
    awq: AwqConfig = AwqConfig()
    """AWQ."""
    hqq: HqqConfig = HqqConfig()
    """HQQ."""
    autoround: AutoRoundConfig = AutoRoundConfig()
    """AutoRound."""

"""The column loop of GPTQ, for many grids at once.

Channel k of every grid is rounded towards w_k + sum_{j<k} D_j U_jk, D = w - What (`hessian` says why). A block takes
the errors of all channels before it by one matrix product; inside a block every channel adds its own to those after.
Matrices lie transposed, so that a channel is contiguous, and each grid has a matrix of its own with rows padded to
whole vectors, so that its arithmetic, bit for bit, does not depend on which grids are solved beside it.

I: inputs, O: outputs, S: grids, B: channels of a block.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["LANES", "BlockGrid", "GridOf", "fed_back", "solve_columns"]

LANES = 16
"""Float32 values of the widest vector; the number of outputs is padded to a multiple of it."""

BlockGrid = tuple[Tensor, Tensor, Tensor]
"""Scale, smallest and largest centred code of each weight of a block, [B, S, O]."""

GridOf = Callable[[int, int, Tensor], BlockGrid]
"""The grid of channels start .. stop, given their targets as they are when the block begins, [S, B, O]."""


def solve_columns(
    weight_IO: Tensor, upper_II: Tensor, grid_of: GridOf, num_grids: int, block_size: int
) -> Tensor:
    """Centred codes of every grid, [S, I, O] int16.

    Args:
        weight_IO: channels in the order in which they are solved; float32, or float64 to compute in it.
        upper_II: feedback in the same order.
    """
    errors_SIO = weight_IO.new_zeros(num_grids, *weight_IO.shape)
    codes_SIO = torch.empty(errors_SIO.shape, dtype=torch.int16, device=weight_IO.device)
    for start, stop in _blocks(len(weight_IO), block_size):
        target_SBO = weight_IO[start:stop].repeat(num_grids, 1, 1)
        for target_BO, errors_IO in zip(target_SBO, errors_SIO, strict=True):
            target_BO.addmm_(upper_II[:start, start:stop].t(), errors_IO[:start])
        grid = grid_of(start, stop, target_SBO)
        upper_BB = upper_II[start:stop, start:stop]
        errors_SBO = errors_SIO[:, start:stop]
        codes_SIO[:, start:stop] = _solve_block(
            weight_IO[start:stop], target_SBO.transpose(0, 1), upper_BB, grid, errors_SBO
        )
    return codes_SIO


def fed_back(weight_BO: Tensor, target_BO: Tensor, upper_BB: Tensor) -> Tensor:
    """The weights of a block that would now be best if they were never rounded, [B, O].

    A target leaves out what the channels of the block will do for each other: best is the D with (D U)_k = 0 for all
    of them, that is w + (target - w) U_BB^-1.
    """
    owed_BO = target_BO - weight_BO
    change_BO: Tensor = torch.linalg.solve_triangular(upper_BB.t(), owed_BO, upper=False, unitriangular=True)
    return weight_BO + change_BO


def _blocks(size: int, step: int) -> Iterator[tuple[int, int]]:
    """start, stop of each block."""
    return ((start, min(start + step, size)) for start in range(0, size, step))


def _solve_block(
    weight_BO: Tensor, target_BSO: Tensor, upper_BB: Tensor, grid: BlockGrid, errors_SBO: Tensor
) -> Tensor:
    """Round the channels of a block one by one; writes `errors_SBO`, spends `target_BSO`, returns codes [S, B, O]."""
    codes_BSO = torch.empty_like(grid[0])
    for k, (scale, low, high) in enumerate(zip(*grid, strict=True)):
        codes = torch.div(target_BSO[k], scale, out=codes_BSO[k]).round_()
        torch.clamp(codes, low, high, out=codes)
        # The product as `dequantize` rounds it, also where the loop runs in float64.
        error = torch.sub(weight_BO[k], torch.mul(codes, scale).float(), out=errors_SBO[:, k])
        if k + 1 < len(weight_BO):
            target_BSO[k + 1 :].addcmul_(upper_BB[k, k + 1 :, None, None], error)
    return codes_BSO.transpose(0, 1)

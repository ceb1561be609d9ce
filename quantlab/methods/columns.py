"""The column loop of GPTQ, for many grids at once.

Channel k of every grid is rounded towards w_k + sum_{j<k} D_j U_jk, D = w - What (`hessian` says why). A block takes
the errors of all channels before it by one matrix product; inside a block every channel adds its own to those after.
Matrices lie transposed, so that a channel is contiguous, and each grid has a matrix of its own with rows padded to
whole vectors, so that its arithmetic, bit for bit, does not depend on which grids are solved beside it.

I: inputs, O: outputs, S: grids, B: channels of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LANES", "BlockGrid", "GridOf", "fed_back", "solve_columns"]

LANES = 16
"""Float32 values of the widest vector; the number of outputs is padded to a multiple of it."""

BlockGrid = tuple[Tensor, Tensor, Tensor]
"""Scale, smallest and largest centred code of each weight of a block, [S, B, O]."""

GridOf = Callable[[slice, slice, Tensor], BlockGrid]
"""The grid of some channels and some outputs, given their targets as they are when the block begins, [S, B, O]."""

OUTPUTS = 2048
"""Outputs that are solved together, a multiple of LANES: none needs another's errors, so memory holds only theirs."""

_LEAF = 16
"""Channels that are solved one by one; a longer block is cut in halves, with a matrix product between them."""


def solve_columns(
    weight_IO: Tensor, upper_II: Tensor, grid_of: GridOf, num_grids: int, block_size: int
) -> Tensor:
    """Centred codes of every grid, [S, I, O] int16; besides them memory holds S x I x OUTPUTS errors.

    Args:
        weight_IO: channels in the order in which they are solved; float32, or float64 to compute in it.
        upper_II: feedback in the same order.
    """
    shape = (num_grids, *weight_IO.shape)
    codes_SIO = torch.empty(shape, dtype=torch.int16, device=weight_IO.device)
    for first in range(0, shape[2], OUTPUTS):
        outputs = slice(first, min(first + OUTPUTS, shape[2]))
        _solve_outputs(weight_IO, upper_II, grid_of, outputs, block_size, codes_SIO)
    return codes_SIO


def _solve_outputs(
    weight_IO: Tensor, upper_II: Tensor, grid_of: GridOf, outputs: slice, block_size: int, codes_SIO: Tensor
) -> None:
    """Fill in the codes of some outputs, block by block."""
    weight_IO = weight_IO[:, outputs]
    errors_SIO = weight_IO.new_empty(len(codes_SIO), *weight_IO.shape)
    for start in range(0, len(weight_IO), block_size):
        here = slice(start, min(start + block_size, len(weight_IO)))
        target_SBO = weight_IO[here].repeat(len(codes_SIO), 1, 1)
        _feed(target_SBO, upper_II[:start, here], errors_SIO[:, :start])
        grid = grid_of(here, outputs, target_SBO)
        _solve_block(weight_IO[here], target_SBO, upper_II[here, here], grid, errors_SIO[:, here])
        codes_SIO[:, here, outputs] = target_SBO.to(torch.int16)


def fed_back(weight_BO: Tensor, target_BO: Tensor, upper_BB: Tensor) -> Tensor:
    """The weights of a block that would now be best if they were never rounded, [B, O].

    A target leaves out what the channels of the block will do for each other: best is the D with (D U)_k = 0 for all
    of them, that is w + (target - w) U_BB^-1.
    """
    owed_BO = target_BO - weight_BO
    change_BO: Tensor = torch.linalg.solve_triangular(upper_BB.t(), owed_BO, upper=False, unitriangular=True)
    return weight_BO + change_BO


def _feed(target_SBO: Tensor, upper_JB: Tensor, errors_SJO: Tensor) -> None:
    """Add to targets, in place, what the errors of earlier channels J ask of them; one product for each grid."""
    if len(upper_JB):
        for target_BO, errors_JO in zip(target_SBO, errors_SJO, strict=True):
            target_BO.addmm_(upper_JB.t(), errors_JO)


def _solve_block(
    weight_BO: Tensor, target_SBO: Tensor, upper_BB: Tensor, grid: BlockGrid, errors_SBO: Tensor
) -> None:
    """Round a block of channels: turns targets into codes and fills `errors_SBO`, both in place."""
    half = len(weight_BO) // 2
    if 2 * half <= _LEAF:
        _solve_leaf(weight_BO, target_SBO, upper_BB, grid, errors_SBO)
        return
    for part in (slice(half), slice(half, None)):
        if part.start:
            _feed(target_SBO[:, half:], upper_BB[:half, half:], errors_SBO[:, :half])
        scale, low, high = grid
        rows = (scale[:, part], low[:, part], high[:, part])
        _solve_block(weight_BO[part], target_SBO[:, part], upper_BB[part, part], rows, errors_SBO[:, part])


def _solve_leaf(
    weight_BO: Tensor, target_SBO: Tensor, upper_BB: Tensor, grid: BlockGrid, errors_SBO: Tensor
) -> None:
    """The same one by one: each channel adds its error to the targets of those after it."""
    for k, (scale, low, high) in enumerate(zip(*(part.unbind(1) for part in grid), strict=True)):
        codes = target_SBO[:, k].div_(scale).round_()
        torch.clamp(codes, low, high, out=codes)
        # The product as `dequantize` rounds it, also where the loop runs in float64.
        error = torch.sub(weight_BO[k], torch.mul(codes, scale).float(), out=errors_SBO[:, k])
        if k + 1 < len(weight_BO):
            target_SBO[:, k + 1 :].addcmul_(upper_BB[k, k + 1 :, None], error[:, None])

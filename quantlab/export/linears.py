"""Which linears of a model get low bits: those of the decoder that `quantized` would swap, without any swap."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from quantlab.errors import SchemeError, nearest
from quantlab.layers.targets import Target, find_targets

__all__ = ["choose_linears"]


def choose_linears(model: nn.Module, skip: Sequence[str]) -> dict[str, list[Target]]:
    """The decoder's linears: "swapped", those to quantize, and "skipped", those that a pattern of `skip` keeps.

    Raises:
        SchemeError: a pattern matches no matrix, nothing is left to quantize, or a matrix cannot be stored in low
            bits by itself (experts fused into one parameter, weights that two linears share).
    """
    matrices = find_targets(model)
    for pattern in skip:
        if not any(fnmatchcase(matrix.name, pattern) for matrix in matrices):
            hint = nearest(pattern, ["*." + matrix.name.rpartition(".")[2] for matrix in matrices])
            raise SchemeError(f"a skip pattern must match a weight matrix: {pattern!r} matches none.{hint}")
    targets = [matrix for matrix in matrices if matrix.sort in ("linear", "fused")]
    skipped = [target for target in targets if any(fnmatchcase(target.name, pattern) for pattern in skip)]
    swapped = [target for target in targets if target not in skipped]
    if not swapped:
        raise SchemeError(
            f"an export must hold low-bit weights: {len(skipped)} linears of {type(model).__name__} are skipped and "
            f"none is left. Skip less."
        )
    for target in swapped:
        _check_separate(target)
    return {"swapped": swapped, "skipped": skipped}


def _check_separate(target: Target) -> None:
    if target.sort == "fused":
        raise SchemeError(
            f"expert matrices fused into one parameter cannot be stored in low bits in this version: {target.name} is "
            f'{list(target.shape)}. Add "*.{target.name.rpartition(".")[2]}" to skip, and they keep their precision.'
        )
    if target.tied_to is not None:
        raise SchemeError(
            f"linears must own their weights to be stored in low bits: {target.name} shares those of {target.tied_to}. "
            f'Add both to skip: "{target.name}" and "{target.tied_to}".'
        )

"""Granularity: which values share a scale, as a view of the tensor and the dimensions that the scale spans.

    tensor                          granularity   view              spans    scale
    weight [O, I]                   tensor        [O, I]            O, I     [1, 1]
                                    channel       [O, I]            I        [O, 1]
                                    group         [O, I/g, g]       g        [O, I/g, 1]
    inputs of linears [.., T, C]    tensor        [.., T, C]        T, C     [.., 1, 1]
                                    row           [.., T, C]        C        [.., T, 1]
                                    channel       [.., T, C]        T        [.., 1, C]
                                    group         [.., T, C/g, g]   g        [.., T, C/g, 1]
    queries, keys, values           tensor        [B, H, T, d]      H, T, d  [B, 1, 1, 1]
    [B, H, T, d]                    head          [B, H, T, d]      T, d     [B, H, 1, 1]
                                    channel       [B, H, T, d]      T        [B, H, 1, d]
                                    row           [B, H, T, d]      d        [B, H, T, 1]
                                    group         [B, H, T, d/g, g] g        [B, H, T, d/g, 1]
    attention map [B, H, Q, T]      tensor        [B, H, Q, T]      H, Q, T  [B, 1, 1, 1]
                                    map           [B, H, Q, T]      Q, T     [B, H, 1, 1]; FakeQuant joins a map's
                                    head          [B, H, Q, T]      Q, T     [B, H, 1, 1]
                                    row           [B, H, Q, T]      T        [B, H, Q, 1]

The batch is never spanned: a scale belongs to one sequence, so that what else is in a batch cannot change a score.
"""

from typing import Literal

from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.schemes import Granularity, TensorSpec

__all__ = ["NEVER_NEGATIVE", "Kind", "group_view", "spanned_dims"]

Kind = Literal["weight", "inputs", "lambdas", "heads", "cache", "map", "probs"]
"""What sort of tensor: the dimensions that scales span follow from it, and where its grid begins: at 0 for what is
never negative, at a real minimum for caches with `z`."""
NEVER_NEGATIVE: frozenset[Kind] = frozenset({"lambdas", "probs"})
"""Kinds whose codes are 0 to 2^bits - 1 without a zero point."""

_MAP: dict[Granularity, tuple[int, ...]] = {
    "tensor": (-3, -2, -1),
    "map": (-2, -1),
    "head": (-2, -1),
    "row": (-1,),
}
_HEADS: dict[Granularity, tuple[int, ...]] = {
    "tensor": (-3, -2, -1),
    "head": (-2, -1),
    "channel": (-2,),
    "row": (-1,),
    "group": (-1,),
}
_SPANS: dict[Kind, dict[Granularity, tuple[int, ...]]] = {
    "weight": {"tensor": (-2, -1), "channel": (-1,), "group": (-1,)},
    "inputs": {"tensor": (-2, -1), "row": (-1,), "channel": (-2,), "group": (-1,)},
    "lambdas": {"tensor": (-2, -1), "row": (-1,)},
    "heads": _HEADS,
    "cache": _HEADS,
    "map": _MAP,
    "probs": _MAP,
}


def spanned_dims(kind: Kind, spec: TensorSpec) -> tuple[int, ...]:
    """Dimensions of `group_view(x, spec)` that one scale spans, counted from the last; per map, within a head."""
    return _SPANS[kind][spec.granularity]


def group_view(x: Tensor, spec: TensorSpec) -> Tensor:
    """x [.., C] as [.., C / group_size, group_size] where the spec has groups, else x itself; no copy.

    Raises:
        SchemeError: group_size does not divide C.
    """
    if spec.group_size is None:
        return x
    if x.shape[-1] % spec.group_size:
        raise SchemeError(
            f"group_size must divide the last dimension: found {x.shape[-1]}, group_size={spec.group_size}."
        )
    return x.reshape(*x.shape[:-1], x.shape[-1] // spec.group_size, spec.group_size)

"""Walking a tensor in parts that stay in a core's cache, through buffers that are used again."""

import threading
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

_held = threading.local()


def chunks(x: Tensor, size: int) -> Iterator[tuple[torch.Size, list[Tensor]]]:
    """x in parts of at most `size` values, two-dimensional, neighbours of one shape together; empty parts left out.

    A strided tensor is cut by rows, so that it is read once and not copied.
    """
    flat = x.is_contiguous() or x.ndim < 2
    for columns in (x.flatten()[None] if flat else x.reshape(-1, x.shape[-1])).split(size, dim=1):
        if columns.numel():
            parts = columns.split(max(1, size // columns.shape[1]))
            for shape, group in groupby(parts, key=lambda part: part.shape):
                yield shape, list(group)


def buffer(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, size], not cleared, the same for every call of a thread: fresh pages would cost as much as the work."""
    held: dict[tuple[object, ...], Tensor] = _held.__dict__.setdefault("buffers", {})
    key = (rows, size, dtype, device)
    if key not in held:
        held[key] = torch.empty(rows, size, dtype=dtype, device=device)
    return held[key]

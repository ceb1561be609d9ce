"""Exact sums of products of int8 codes, by one of two backends that give the same bits.

    native     torch._int_mm: int8 instructions where torch uses them, a plain loop elsewhere; cuBLAS on CUDA
    float32    float products of blocks of inputs, whose sums are added in int32

A float32 product of integers is exact, whatever its order and with or without fused multiply-adds, while no partial
sum can pass 2^24: over 2^24 / (a b) inputs, for codes up to a on the left and up to b on the right. Codes of 8 bits
keep their value in the bfloat16 and TF32 that a setting may round them to; sums do not keep theirs, hence
`full_precision`.

The native product is trusted where it equals int64 arithmetic. oneDNN adds 128 to the left codes, and on CPUs
without VNNI it sums pairs of products in 16 bits: 255 * 127 twice does not fit there, 1 * 127 twice does. So the
largest codes of either sign stand in every place of the check. Of two exact backends the faster one runs, as a probe
of milliseconds finds it, once a process for each device and number of threads.

M tokens, K inputs, N outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from time import perf_counter, thread_time
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Backend",
    "backend_of",
    "exact_product",
    "float32_product",
    "full_precision",
    "inputs_of_a_block",
    "native_is_exact",
    "native_product",
]

Backend = Literal["native", "float32"]

LARGEST_CODE = 128
"""The largest magnitude of an int8 code."""

_EXACT = 2**24
"""Every integer up to here is a float32."""

_CHECKED = ((40, 1024, 24), (33, 70, 17), (1, 96, 16))
"""M, K, N of products that must equal int64: whole tiles, remainders, one row."""

_TIMED = (32, 256, 256)
"""M, K, N of the product that is timed."""


def inputs_of_a_block(largest_left: int, largest_right: int) -> int:
    """The most inputs whose float32 product is exact in any order: a b K <= 2^24."""
    return _EXACT // (largest_left * largest_right)


def exact_product(
    left_MK: Tensor,
    right_NK: Tensor,
    largest: tuple[int, int] = (LARGEST_CODE, LARGEST_CODE),
    out: Tensor | None = None,
) -> Tensor:
    """Sums [M, N] int32 of int8 codes, into `out` where given.

    Args:
        largest: the largest magnitudes that codes of either side can have.
    """
    if backend_of(left_MK.device) == "native":
        return native_product(left_MK, right_NK, out)
    return float32_product(left_MK, right_NK, largest, out)


def backend_of(device: torch.device) -> Backend:
    """What multiplies on a device in this process."""
    return _choose(str(device), torch.get_num_threads(), torch.backends.mkldnn.enabled)


def float32_product(
    left_MK: Tensor,
    right_NK: Tensor,
    largest: tuple[int, int] = (LARGEST_CODE, LARGEST_CODE),
    out: Tensor | None = None,
) -> Tensor:
    """`exact_product` by float products of blocks."""
    size = inputs_of_a_block(*largest)
    sums = left_MK.new_empty(len(left_MK), len(right_NK), dtype=torch.int32) if out is None else out
    with full_precision(left_MK.device.type):
        for start in range(0, max(left_MK.shape[1], 1), size):
            block = slice(start, start + size)
            floats = left_MK[:, block].float() @ right_NK[:, block].float().t()
            if start:
                sums.add_(floats.int())
            else:
                sums.copy_(floats)
    return sums


def native_product(left_MK: Tensor, right_NK: Tensor, out: Tensor | None = None) -> Tensor:
    """`exact_product` by torch's own; on CUDA padded to sizes that cuBLAS takes."""
    if left_MK.device.type == "cuda":
        return padded_product(left_MK, right_NK)
    return torch._int_mm(left_MK, right_NK.t(), **({} if out is None else {"out": out}))


def padded_product(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """`native_product` with M padded to at least 32 and every size to a multiple of 8; zeros add nothing to a sum."""
    (num_rows, num_inputs), num_outputs = left_MK.shape, right_NK.shape[0]
    inputs, outputs = -num_inputs % 8, -num_outputs % 8
    rows = max(32 - num_rows, -num_rows % 8)
    left = functional.pad(left_MK, (0, inputs, 0, rows)) if inputs or rows else left_MK
    right = functional.pad(right_NK, (0, inputs, 0, outputs)) if inputs or outputs else right_NK
    return torch._int_mm(left.contiguous(), right.t())[:num_rows, :num_outputs]


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """float32 products stay float32: no autocast, no TF32 and no bfloat16 inside."""
    backends: Any = torch.backends
    matmul = (backends.cuda if device_type == "cuda" else backends.mkldnn).matmul
    before = matmul.fp32_precision
    lowered = before not in ("none", "ieee")
    with torch.autocast(device_type, enabled=False):
        if not lowered:
            yield
            return
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def native_is_exact(device: torch.device) -> bool:
    """Whether this machine's int8 product exists and equals int64, on random codes and the largest of either sign."""
    try:
        return all(
            torch.equal(native_product(left, right).cpu().long(), left.cpu().long() @ right.cpu().long().t())
            for left, right in (_codes(*sizes, device) for sizes in _CHECKED)
        )
    except (RuntimeError, NotImplementedError):
        return False


@cache
def _choose(device: str, threads: int, mkldnn: bool) -> Backend:
    """The faster of the backends that are exact; threads and mkldnn are what the process has set."""
    place = torch.device(device)
    if not native_is_exact(place):
        return "float32"
    left, right = _codes(*_TIMED, place)
    floats = _seconds(lambda: float32_product(left, right), place)
    return "native" if _seconds(lambda: native_product(left, right), place) < floats else "float32"


def _codes(num_rows: int, num_inputs: int, num_outputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes of both sides: rows of 127, of -128, of both in turn and in any order, and of any codes."""
    generator = torch.Generator().manual_seed(0)

    def side(count: int) -> Tensor:
        codes = torch.randint(-128, 128, (count, num_inputs), generator=generator)
        extremes = torch.randint(0, 2, (count, num_inputs), generator=generator) * 255 - 128
        codes[: count // 2] = extremes[: count // 2]
        turns = torch.arange(num_inputs) % 2 * 255 - 128
        fixed = torch.stack(
            [turns.new_full(turns.shape, 127), turns.new_full(turns.shape, -128), turns, -1 - turns]
        )
        codes[: len(fixed)] = fixed[:count]
        return codes.to(device, torch.int8)

    return side(num_rows), side(num_outputs)


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """The least time of three calls, after one that warms up.

    On a CPU that of one thread's work: with more, a machine that does other things times its own scheduler.
    """
    clock, threads = perf_counter if device.type == "cuda" else thread_time, torch.get_num_threads()

    def once() -> float:
        began = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - began

    torch.set_num_threads(1)
    try:
        return min([once() for _ in range(4)][1:])
    finally:
        torch.set_num_threads(threads)

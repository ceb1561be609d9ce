"""Packed 4- and 8-bit linears against a bf16 linear, one thread, weights that no cache holds.

    python benchmarks/packed_linear.py [--features 4096] [--group 128] [--rounds 40] [--mib 640]

Every side owns as many copies of its weight as fill `--mib` mebibytes (more than the cache), and each call takes the
next. In a round all sides are called once, one after another, and one slice of a large buffer is read (`sum` of
float32); medians over rounds of CPU time are compared, so that other work on the machine meets every side alike.

The first table is M = 1, with the bytes that a call must read over its time, as a share of the bandwidth that reading
the buffer reached. The second shows where unpacking and a bf16 product overtake the packed product
(`FEWEST_FOR_GEMM` of `quantlab.kernels.packed_int4` and `packed_int8`). W8A8 is `quantlab.kernels.integer`, which
quantizes its inputs within the timed call.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from quantlab.kernels import integer, packed_int4, packed_int8
from quantlab.machine import cpu_line
from quantlab.methods.rtn import quantize_weight
from quantlab.schemes import Scheme, TensorSpec

TOKENS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 64)
ELEMENTS = 1 << 26
"""Of a slice of the buffer that is read for bandwidth: 256 MiB."""


@dataclass
class Side:
    """One way to compute the linear, with its weights."""

    name: str
    num_bytes: int
    """Bytes of weights that one call reads."""
    call: Callable[[Tensor], object]


def copies(weight: object, num_bytes: int, mib: int) -> "cycle[object]":
    """Clones of a tensor or module, enough to fill `mib` mebibytes, forever in turn."""
    count = max(2, -(-(mib << 20) // num_bytes))
    if isinstance(weight, Tensor):
        return cycle([weight.clone() for _ in range(count)])
    modules = []
    for _ in range(count):
        copied = object.__new__(type(weight))
        copied.__dict__.update(weight.__dict__)
        copied._buffers = {  # type: ignore[attr-defined]
            name: None if buffer is None else buffer.clone()
            for name, buffer in weight._buffers.items()  # type: ignore[attr-defined]
        }
        modules.append(copied)
    return cycle(modules)


def size_of(weight: object) -> int:
    """Bytes of a tensor, or of a module's buffers."""
    buffers = [weight] if isinstance(weight, Tensor) else weight.buffers()  # type: ignore[attr-defined]
    return sum(buffer.nbytes for buffer in buffers)


def sides_of(features: int, group: int, mib: int) -> dict[str, Side]:
    """All sides on a random matrix [features, features]."""
    real = torch.randn(features, features, generator=torch.Generator().manual_seed(0))
    schemes = {name: Scheme.parse(name) for name in (f"w4g{group}", "w8", "w8a8")}
    specs = [scheme.weights for scheme in schemes.values()]
    assert all(isinstance(spec, TensorSpec) for spec in specs)
    w4, w8, _ = (quantize_weight(real, spec) for spec in specs)  # type: ignore[arg-type]
    inputs = schemes["w8a8"].activations
    assert inputs is not None
    sides = {}

    def add(name: str, weight: object, call: Callable[[Tensor, object], object]) -> None:
        ring = copies(weight, size_of(weight), mib)
        sides[name] = Side(name, size_of(weight), lambda x: call(x, next(ring)))

    add("bf16 F.linear", real.to(torch.bfloat16), functional.linear)  # type: ignore[arg-type]
    add(f"w4g{group}, packed product", packed_int4.Int4Weight(w4), _int4_op)
    add(f"w4g{group}, unpacked", packed_int4.Int4Weight(w4), packed_int4.unpacked_linear)  # type: ignore[arg-type]
    add("w8, packed product", packed_int8.PackedInt8Weight(w8), _int8_op)
    add("w8, widened", packed_int8.PackedInt8Weight(w8), packed_int8.widened_linear)  # type: ignore[arg-type]
    add("w8a8", integer.Int8Weight(w8), lambda x, w: integer.linear(x, w, None, inputs))  # type: ignore[arg-type]
    return sides


def _int4_op(x: Tensor, weight: packed_int4.Int4Weight) -> object:  # type: ignore[misc]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, weight.packed, weight.group_size, weight.scales_and_zeros
    )


def _int8_op(x: Tensor, weight: packed_int8.PackedInt8Weight) -> object:  # type: ignore[misc]
    return torch.ops.aten._weight_int8pack_mm(x, weight.codes, weight.scale)


def cpu_ms(call: Callable[[], object]) -> float:
    """CPU time of one call, milliseconds."""
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def measure(sides: dict[str, Side], num_tokens: int, features: int, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of every side, all called in each round."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, features, generator=generator).to(torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 2):
        for name, side in sides.items():
            taken = cpu_ms(lambda side=side: side.call(x))  # type: ignore[misc]
            if i >= 2:
                times[name].append(taken)
    return {name: median(column) for name, column in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--mib", type=int, default=640)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    sides = sides_of(arguments.features, arguments.group, arguments.mib)
    slices = cycle(torch.ones(4, ELEMENTS).unbind())
    reading = Side("reading a buffer", 4 * ELEMENTS, lambda x: next(slices).sum())
    bf16, *others = sides
    small = {name: side for name, side in sides.items() if "un" not in name and "widened" not in name}
    first = measure(small | {reading.name: reading}, 1, arguments.features, arguments.rounds)
    roof = reading.num_bytes / first[reading.name]
    print(cpu_line())  # noqa: T201
    print(f"M = 1, {arguments.features} x {arguments.features}, one thread\n")  # noqa: T201
    print("| | MB read | CPU ms | times faster than bf16 | GB/s | share of read bandwidth |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    for name, side in (small | {reading.name: reading}).items():
        rate = side.num_bytes / first[name]
        faster = "" if side is reading else f"{first[bf16] / first[name]:.2f}"
        row = (
            name,
            f"{side.num_bytes / 1e6:.1f}",
            f"{first[name]:.3f}",
            faster,
            f"{rate / 1e6:.1f}",
            f"{rate / roof:.0%}",
        )
        print(f"| {' | '.join(row)} |")  # noqa: T201
    print(f"\nCPU ms by tokens\n\n| M | {' | '.join(sides)} |")  # noqa: T201
    print("|---" * (len(sides) + 1) + "|")  # noqa: T201
    for num_tokens in TOKENS:
        rounds = max(5, arguments.rounds // (1 if num_tokens < 16 else 3))
        times = measure(sides, num_tokens, arguments.features, rounds)
        cells = " | ".join(f"{times[name]:.2f}" for name in (bf16, *others))
        print(f"| {num_tokens} | {cells} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

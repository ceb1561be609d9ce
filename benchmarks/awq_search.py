"""AWQ's search of scales from X^T X, against a forward pass for each grid point. One thread.

    python benchmarks/awq_search.py [--tokens 16384] [--rounds 3] [--steps 20] [--scheme w4g64] [--only down]

The forward way is AutoAWQ's: each grid point quantizes the scaled weights, runs them on the calibration tokens, and
compares with the outputs of the 16-bit weights, which are computed once, outside the timed part. Both sides take the
same candidates (the first family of scales) and the same rounding, in float32. They alternate, and CPU time of the
best round counts: other processes then cost neither side. X^T X serves every method, bit width and group size; its
cost is a column of its own, and "with X^T X" is the ratio where a single search must pay for all of it. Inputs are
correlated and some channels are large; "loss" is the largest relative difference over the grid, "alpha" the choices.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from quantlab.machine import cpu_line
from quantlab.methods.awq import candidate_scales, output_errors
from quantlab.methods.rtn import quantize_weight
from quantlab.schemes import Scheme, TensorSpec

LAYERS: dict[str, tuple[tuple[int, ...], int]] = {
    "q, k, v of SmolLM2-135M": ((576, 192, 192), 576),
    "gate, up of SmolLM2-135M": ((1536, 1536), 576),
    "down of SmolLM2-135M": ((576,), 1536),
    "one linear": ((2048,), 2048),
}
"""Name -> outputs of the linears that share an input, and its channels."""
_CHUNK = 2048
"""Tokens at a time, so that outputs stay near the processor."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def cpu_seconds(
    call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> tuple[float, Result]:
    """CPU time of one call, and what it returned."""
    start = time.process_time()
    result = call(*args, **kwargs)
    return time.process_time() - start, result


def gram(x_TI: Tensor) -> Tensor:
    """X^T X, float32."""
    sums = torch.zeros(x_TI.shape[1], x_TI.shape[1])
    for x in x_TI.split(_CHUNK):
        sums.addmm_(x.T, x)
    return sums


def forward_errors(
    weights: Sequence[Tensor],
    spec: TensorSpec,
    x_TI: Tensor,
    outputs: Sequence[Tensor],
    candidates_AI: Tensor,
) -> list[float]:
    """Summed squared error of the outputs at each candidate, by running the linears."""
    errors = []
    for scales in candidates_AI:
        error = 0.0
        for weight, truth_TO in zip(weights, outputs, strict=True):
            rounded = quantize_weight(weight * scales, spec).dequantize().div_(scales)
            for x, truth in zip(x_TI.split(_CHUNK), truth_TO.split(_CHUNK), strict=True):
                error += float((x @ rounded.T).sub_(truth).square_().sum())
        errors.append(error)
    return errors


def compare(outputs: tuple[int, ...], inputs: int, spec: TensorSpec, options: argparse.Namespace) -> str:
    """Cells of one row."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    mixing *= torch.exp(torch.randn(inputs, generator=generator))
    x_TI = torch.randn(options.tokens, inputs, generator=generator) @ mixing
    weights = [torch.randn(rows, inputs, generator=generator) * 0.02 for rows in outputs]
    truths = [x_TI @ weight.T for weight in weights]
    candidates = candidate_scales(weights, spec, gram(x_TI), options.steps)[: options.steps]
    times = []
    for _ in range(options.rounds):
        forward_s, theirs = cpu_seconds(forward_errors, weights, spec, x_TI, truths, candidates)
        gram_s, gram_II = cpu_seconds(gram, x_TI)
        ours_s, ours = cpu_seconds(output_errors, weights, spec, gram_II, candidates)
        times.append((forward_s, gram_s, ours_s))
    forward_s, gram_s, ours_s = (min(column) for column in zip(*times, strict=True))
    difference = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    alphas = [errors.index(min(errors)) / options.steps for errors in (theirs, ours)]
    return (
        f"{forward_s:.2f} | {ours_s:.2f} | {forward_s / ours_s:.1f} | {gram_s:.2f} | "
        f"{forward_s / (ours_s + gram_s):.1f} | {difference:.1e} | {alphas[0]:g}, {alphas[1]:g}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scheme", default="w4g64")
    parser.add_argument("--only", default="", help="part of a row's name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = Scheme.parse(options.scheme).weights
    assert isinstance(spec, TensorSpec)
    print(  # noqa: T201
        f"{cpu_line()}\n"
        f"{options.scheme}, n = {options.tokens} tokens, {options.steps} grid points, CPU seconds, best of "
        f"{options.rounds}\n\n"
        "| linears | forward | from X^T X | times faster | X^T X | with X^T X | loss | alpha |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for name, (outputs, inputs) in LAYERS.items():
        if options.only not in name:
            continue
        shape = f"{'+'.join(map(str, outputs))} x {inputs}"
        print(f"| {name}: {shape} | {compare(outputs, inputs, spec, options)} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

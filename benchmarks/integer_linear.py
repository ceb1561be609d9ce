"""Integer products against float32 fake-quantized ones, one linear, one thread.

    python benchmarks/integer_linear.py [--tokens 1024] [--features 2048] [--rounds 5]

Both sides quantize their inputs dynamically, per token, inside the timed call; weights are ready for both (dequantized
float32 for fake-quant, int8 codes for integers). The two alternate, and CPU time of the best round counts: other
processes then cost neither side. Also prints the largest difference relative to the largest output.
"""

import argparse
import time
from collections.abc import Callable

import torch

from quantlab.kernels import integer, reference
from quantlab.kernels.product import backend_of
from quantlab.machine import cpu_line
from quantlab.methods.rtn import quantize_weight
from quantlab.schemes import Scheme

SCHEMES = ("w8a8", "w4a8", "w8a8z", "w8za8", "w4za8z", "w4g256a8", "w4g128a8", "w4g64a8", "w4g32a8")


def cpu_ms(call: Callable[[], torch.Tensor]) -> float:
    """CPU time of one call, milliseconds."""
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def compare(name: str, tokens: int, features: int, rounds: int) -> tuple[float, float, float]:
    """Best CPU times of fake-quant and integers, ms, and the largest relative difference of their outputs."""
    scheme = Scheme.parse(name)
    assert scheme.weights is not None and scheme.activations is not None
    spec = scheme.activations
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, features, generator=generator)
    weight = quantize_weight(torch.randn(features, features, generator=generator), scheme.weights)
    weight_OI, codes = weight.dequantize(), integer.Int8Weight(weight)
    sides: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: reference.linear(x, weight_OI, None, spec),
        lambda: integer.linear(x, codes, None, spec),
    )
    fake, real = (side() for side in sides)
    times = [[cpu_ms(side) for side in sides] for _ in range(rounds)]
    best_fake, best_real = (min(column) for column in zip(*times, strict=True))
    return best_fake, best_real, float((fake - real).abs().max() / fake.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = f"M={arguments.tokens}, {arguments.features}x{arguments.features}"
    print(f"{cpu_line()}; integer sums by {backend_of(torch.device('cpu'))}")  # noqa: T201
    print(f"{size}, one thread, CPU ms, best of {arguments.rounds}")  # noqa: T201
    print("scheme      fake-quant   integer   times faster   largest difference")  # noqa: T201
    for name in SCHEMES:
        fake, real, difference = compare(name, arguments.tokens, arguments.features, arguments.rounds)
        print(f"{name:<12}{fake:>10.1f}{real:>10.1f}{fake / real:>15.2f}{difference:>21.1e}")  # noqa: T201


if __name__ == "__main__":
    main()

"""Differential attention against ordinary attention and against the two-call form, one thread on a CPU, or on CUDA.

    python benchmarks/differential_attention.py [--lengths 256 1024 2048] [--heads 8] [--head-dim 64] [--rounds 15]

`diff_v1` is what the attention layer runs outside `attention_sites`, from queries, keys and values to head outputs.
Its peers hold the same parameters: plain SDPA over 2H heads of width d, and the two-call form, SDPA of each map with
values of width 2d. `diff_v2` is compared with SDPA over its 2H query heads on H key heads. All sides alternate; CPU
time of the best round counts (wall time on CUDA, after synchronisation). Outputs are compared before any is timed.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantlab.attention.variants import VARIANTS
from quantlab.machine import cpu_line
from quantlab.models.configuration import QuantlabConfig

Side = Callable[[], Tensor]


def layer(variant: str, heads: int, head_dim: int, device: str) -> torch.nn.Module:
    """An attention layer of the variant with seeded weights; `heads` as its configuration counts them."""
    config = QuantlabConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, head_dim=head_dim, variant=variant
    )
    config._attn_implementation = "sdpa"
    attention = VARIANTS[variant].attention(config, 5)
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data.normal_(std=0.05, generator=generator)
    return attention.to(device).eval()


def sides(length: int, heads: int, head_dim: int, device: str) -> dict[str, Side]:
    """Every side of the comparison, on the same inputs."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def random(num_heads: int, width: int) -> Tensor:
        return torch.randn(1, num_heads, length, width, generator=generator).to(device, dtype)

    first, second = layer("diff_v1", 2 * heads, head_dim, device), layer("diff_v2", heads, head_dim, device)
    q, k, v = random(2 * heads, head_dim), random(2 * heads, head_dim), random(heads, 2 * head_dim)
    shared_k, shared_v = random(heads, head_dim), random(heads, head_dim)
    hidden = torch.randn(1, length, heads * head_dim, generator=generator).to(device)
    rule_1, rule_2 = first.maps(hidden, q, k), second.maps(hidden, q, k)
    narrow = torch.cat(v.chunk(2, -1), 1)

    def two_calls() -> Tensor:
        added, subtracted = (
            scaled_dot_product_attention(q[:, part], k[:, part], v, is_causal=True)
            for part in (slice(0, None, 2), slice(1, None, 2))
        )
        return (added - rule_1.lambda_.to(dtype) * subtracted).transpose(1, 2)

    return {
        "plain": lambda: scaled_dot_product_attention(q, k, narrow, is_causal=True),
        "two calls": two_calls,
        "diff_v1": lambda: first.attend(q, k, v, None, rule_1),
        "plain 2H": lambda: scaled_dot_product_attention(
            q, shared_k, shared_v, is_causal=True, enable_gqa=True
        ),
        "diff_v2": lambda: second.attend(q, shared_k, shared_v, None, rule_2),
    }


def milliseconds(side: Side, device: str) -> float:
    """One call: CPU time, or wall time on CUDA."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    side()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) * 1e3


def compare(length: int, heads: int, head_dim: int, rounds: int, device: str) -> dict[str, float]:
    """Best milliseconds of each side.

    Raises:
        AssertionError: diff_v1 and the two-call form differ by more than rounding.
    """
    all_sides = sides(length, heads, head_dim, device)
    ours, theirs = all_sides["diff_v1"](), all_sides["two calls"]()
    bound = {"cpu": 1e-5, "cuda": 2e-2}[device] * float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= bound, "diff_v1 does not compute what its peer does"
    times = {name: [] for name in all_sides}
    for _ in range(rounds):
        for name, side in all_sides.items():
            times[name].append(milliseconds(side, device))
    return {name: min(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(cpu_line())  # noqa: T201
    print(f"H={asked.heads}, d={asked.head_dim}, causal, batch 1, {asked.device}, ms, best of {asked.rounds}")  # noqa: T201
    print("length   plain   two calls   diff_v1   /plain   two calls/   plain 2H   diff_v2   /plain 2H")  # noqa: T201
    with torch.no_grad():
        for length in asked.lengths:
            t = compare(length, asked.heads, asked.head_dim, asked.rounds, asked.device)
            print(  # noqa: T201
                f"{length:>6}{t['plain']:>8.1f}{t['two calls']:>12.1f}{t['diff_v1']:>10.1f}"
                f"{t['diff_v1'] / t['plain']:>9.2f}{t['two calls'] / t['diff_v1']:>13.2f}"
                f"{t['plain 2H']:>11.1f}{t['diff_v2']:>10.1f}{t['diff_v2'] / t['plain 2H']:>12.2f}"
            )


if __name__ == "__main__":
    main()

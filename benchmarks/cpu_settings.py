"""What the instruction sets of a CPU change: log-likelihoods of HellaSwag, and the time of a w8a8 forward.

    OMP_NUM_THREADS=1 python benchmarks/cpu_settings.py [--documents 12] [--tokens 128] [--rounds 3]

Each setting is a process of its own, since libraries read them as they start. Bands are the largest and the median
difference of a log-likelihood, in nats, to the first setting on this CPU. The forward is of the shipped standard model
on `tokens` tokens, one thread, CPU time of the best round: `before` forms integer sums by torch's own product whatever
it takes, `after` by the backend that is chosen, `simulated` multiplies floats; the three take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from quantlab import pipeline
from quantlab.config import QuantizeConfig, build_config
from quantlab.kernels import product
from quantlab.machine import cpu_line
from quantlab.models.loading import load_checkpoint
from quantlab.quantize import quantized
from quantlab.schemes import Scheme

MODEL = "package://quantlab/checkpoints/pair/standard"
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "without oneDNN": {"WITHOUT_ONEDNN": "1"},
    "ONEDNN_MAX_CPU_ISA=AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "ATEN_CPU_CAPABILITY=avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "ATEN_CPU_CAPABILITY=default": {"ATEN_CPU_CAPABILITY": "default"},
    "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}


def measure(num_documents: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Log-likelihoods of both schemes and times, of this process's setting."""
    if os.environ.get("WITHOUT_ONEDNN"):
        torch.backends.mkldnn.set_flags(False)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = build_config(
        {
            "checkpoints": [{"path": MODEL}],
            "evaluation": {"tasks": ["hellaswag"], "hellaswag": {"limit": num_documents}},
        }
    )
    checkpoint = load_checkpoint(config.checkpoints[0])
    found: dict[str, Any] = {"backend": product.backend_of(torch.device("cpu"))}
    for scheme in ("w16", "w8a8"):
        _, items = pipeline.evaluate_cell(checkpoint, Scheme.parse(scheme), config, lambda count: None)
        scores = items["hellaswag"]
        found[scheme] = [list(map(float, scores[f"ll_{ending}"])) for ending in range(4)]
    return found | {"ms": forward_ms(checkpoint.model, num_tokens, rounds)}


def forward_ms(model: Any, num_tokens: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds of one forward: before, after, simulated."""
    ids = torch.arange(num_tokens).view(1, -1) + 100
    chosen = product.backend_of
    sides: dict[str, tuple[str, Callable[..., str]]] = {
        "before": ("integer", lambda device: "native"),
        "after": ("integer", chosen),
        "simulated": ("simulated", chosen),
    }
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, (kernel, backend) in sides.items():
            product.backend_of = backend  # type: ignore[assignment]
            with torch.no_grad(), quantized(model, Scheme.parse("w8a8"), QuantizeConfig(kernel=kernel)):
                model(ids)
                start = time.process_time()
                model(ids)
                best[name] = min(best[name], (time.process_time() - start) * 1e3)
    product.backend_of = chosen
    return best


def in_a_process(settings: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure` under settings."""
    asked = [f"--{name}={getattr(arguments, name)}" for name in ("documents", "tokens", "rounds")]
    done = subprocess.run(
        [sys.executable, __file__, "--here", *asked],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | settings,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def band(found: list[list[float]], first: list[list[float]]) -> str:
    """Largest and median difference of a log-likelihood, nats."""
    apart = np.abs(np.array(found) - np.array(first))
    return f"{apart.max():.2g} ({np.median(apart):.2g})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="measure in this process, for the others")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.documents, arguments.tokens, arguments.rounds)))  # noqa: T201
        return
    print(f"{cpu_line()}; {arguments.documents} documents, {arguments.tokens} tokens\n")  # noqa: T201
    print("| setting | w16, nats | w8a8, nats | integer sums | before ms | after ms | simulated ms |")  # noqa: T201
    print("|---|---|---|---|---|---|---|")  # noqa: T201
    first: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        found = in_a_process(settings, arguments)
        first = first or found
        bands = " | ".join(band(found[scheme], first[scheme]) for scheme in ("w16", "w8a8"))
        times = " | ".join(f"{found['ms'][side]:.0f}" for side in ("before", "after", "simulated"))
        print(f"| {name} | {bands} | {found['backend']} | {times} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

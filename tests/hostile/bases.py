"""The good checkpoints that the corpus damages, at toy size."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.hostile.case import INDEX, WEIGHTS
from tests.quantlab.test_gguf import write_gguf
from tests.toys import save_checkpoint, toy_model

EXPORTS = {
    "compressed": ("llama", "w4g32", "compressed-tensors"),
    "ours": ("llama", "w4g32z-rotate", "quantlab"),
    "tables": ("wide", "nf4", "quantlab"),
    "blocks": ("llama", "q4_1", "quantlab"),
    "gptq": ("llama", "w4g32z", "gptq"),
    "nf4": ("wide", "nf4_dq", "bitsandbytes"),
}
"""Folders of low-bit weights: of which checkpoint, by which scheme, in which format."""


def make_bases(folder: Path) -> Path:
    """Write every base under `folder`, which must be new; returns it."""
    save_checkpoint("llama", folder / "llama")
    save_checkpoint("llama", folder / "tied", tie_word_embeddings=True)
    save_checkpoint("gpt2", folder / "gpt2")
    save_checkpoint("diffllama", folder / "diffllama")
    save_checkpoint("quantlab", folder / "diff", variant="diff_v1")
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf/toy.gguf", toy_model(), "llama")
    _split(folder / "llama", folder / "shards")
    _pickle(folder / "llama", folder / "pickles")
    save_checkpoint("llama", folder / "wide", intermediate_size=128)
    for target, (source, scheme, form) in EXPORTS.items():
        _quantize(folder / source, folder / target, scheme, form)
    (folder / "empty").mkdir()
    return folder


def _split(source: Path, target: Path) -> None:
    """The same checkpoint in two shards with an index."""
    shutil.copytree(source, target)
    tensors = load_file(target / WEIGHTS)
    (target / WEIGHTS).unlink()
    places = {name: f"shard-{index % 2}.safetensors" for index, name in enumerate(sorted(tensors))}
    for shard in sorted(set(places.values())):
        part = {name: tensors[name] for name in tensors if places[name] == shard}
        save_file(part, target / shard, metadata={"format": "pt"})
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _pickle(source: Path, target: Path) -> None:
    """The same checkpoint as PyTorch pickles it."""
    shutil.copytree(source, target)
    torch.save(load_file(target / WEIGHTS), target / "pytorch_model.bin")
    (target / WEIGHTS).unlink()


def _quantize(source: Path, target: Path, scheme: str, form: str) -> None:
    """The same checkpoint in low bits."""
    from quantlab.cli import main

    words = ["quantize", str(source), "--scheme", scheme, "--format", form, "-o", str(target)]
    (target.parent / "no-run/records").mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([*words, "--device", "cpu", "--records", str(target.parent / "no-run")])
    assert (target / WEIGHTS).exists()

"""Architectures that transformers renames while it loads: what a folder says of its tensors uses the tensors' names."""

import json
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig

from quantlab.config import CheckpointConfig
from quantlab.export.folder import export_checkpoint
from quantlab.layers.linear import weight_of
from quantlab.manifest import read_manifest
from quantlab.models.loading import load_checkpoint
from quantlab.models.stored_names import StoredNames
from quantlab.quantize import quantized
from quantlab.schemes import Scheme
from quantlab.verify.codes import check_codes
from quantlab.verify.sources import source_of
from tests.toys import FAMILIES, toy_model, toy_tokenizer

READER = Path(__file__).parents[3] / "docs/read_quantlab.py"
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": FAMILIES["gemma3_text"] | {"model_type": "gemma3_text"},
            "vision_config": _VISION | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": FAMILIES["qwen3"] | _DELTA,
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
            },
        },
    ),
}
"""model_type -> (class that saves it, its configuration)."""
CASES = [(name, form) for name in WRAPPED for form in ("quantlab", "compressed-tensors", "torchao")]


def _saved(name: str, folder: Path) -> Path:
    kind, settings = WRAPPED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, kind)(AutoConfig.for_model(name, **settings)).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_folder_of_a_renamed_architecture_is_read_back(name: str, form: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(CheckpointConfig(path=str(_saved(name, tmp_path / "source")), device="cpu"))
    scheme = Scheme.parse("w4g32")
    ids = torch.arange(1, 17)[None]
    with quantized(checkpoint.model, scheme), torch.no_grad():
        expected = checkpoint.model(ids).logits
    folder = tmp_path / "folder"
    export_checkpoint(checkpoint, scheme, form, folder)

    chosen, source = read_manifest(folder)["tensors"], source_of(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert all(any(tensor.startswith(f"{linear}.") for tensor in stored) for linear in chosen)
    report = check_codes(source, chosen, lambda count: None)
    assert report.num_linears == len(chosen) > 0
    assert not report.failures()
    again = load_checkpoint(CheckpointConfig(path=str(folder), device="cpu")) if form == "quantlab" else None
    if again is not None:
        with torch.no_grad():
            assert torch.equal(again.model(ids).logits, expected)


@pytest.mark.parametrize("name", WRAPPED)
def test_the_documents_reader_reads_a_renamed_architecture(name: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(CheckpointConfig(path=str(_saved(name, tmp_path / "source")), device="cpu"))
    folder = tmp_path / "folder"
    export_checkpoint(checkpoint, Scheme.parse("w4g32"), "quantlab", folder)
    found, names = run_path(str(READER))["read"](folder), StoredNames.of_model(checkpoint.model)
    with quantized(checkpoint.model, Scheme.parse("w4g32")):
        for linear, matrix in found.items():
            module = checkpoint.model.get_submodule(names.loaded(linear))
            assert np.array_equal(matrix, weight_of(module).numpy()), linear


def test_what_keeps_its_precision_is_named_both_ways(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(
        CheckpointConfig(path=str(_saved("gemma3", tmp_path / "source")), device="cpu")
    )
    export_checkpoint(checkpoint, Scheme.parse("w4g32"), "compressed-tensors", tmp_path / "folder")
    config = json.loads((tmp_path / "folder/config.json").read_text())["quantization_config"]
    linear = "vision_tower.encoder.layers.0.self_attn.q_proj"
    assert {linear, f"model.{linear}"} <= set(config["ignore"])


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_files_of_a_base_model_and_of_the_causal_one_are_the_same_tensors(family: str) -> None:
    model = toy_model(family)
    names = [name for name in model.state_dict() if name.startswith(f"{model.base_model_prefix}.")]
    bare = [name.removeprefix(f"{model.base_model_prefix}.") for name in names]
    assert StoredNames.of_files(model, bare).tensors == dict(zip(names, bare, strict=True))
    assert StoredNames.of_files(model, names).tensors == dict(zip(names, names, strict=True))


@pytest.mark.parametrize("name", WRAPPED)
def test_both_ways_agree(name: str, tmp_path: Path) -> None:
    """What a model says of where it came from is what transformers did with the headers of its files."""
    folder = _saved(name, tmp_path / "source")
    model = load_checkpoint(CheckpointConfig(path=str(folder), device="cpu")).model
    with safe_open(folder / "model.safetensors", "pt") as file:
        read = StoredNames.of_files(model, file.keys())
    written, held = StoredNames.of_model(model), set(model.state_dict())
    assert {ours: theirs for ours, theirs in read.tensors.items() if ours in held} == {
        ours: theirs for ours, theirs in written.tensors.items() if theirs in set(read.tensors.values())
    }

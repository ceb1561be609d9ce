"""Toy checkpoints of a chosen dtype, their exports, and our simulated model beside them."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantlab.config import CheckpointConfig, QuantizeConfig
from quantlab.export.codes import as_decoded
from quantlab.export.folder import export_checkpoint
from quantlab.export.tensors import stored_dtype
from quantlab.manifest import read_manifest
from quantlab.models.loading import Checkpoint, load_checkpoint
from quantlab.quantize import prepared, quantized
from quantlab.reading.decoded import Decoded
from quantlab.reading.raw import RawFolder
from quantlab.schemes import Scheme
from tests.toys import toy_model, toy_tokenizer


def save_toy(family: str, folder: Path, dtype: torch.dtype = torch.float32, width: int = 128) -> Path:
    """A toy checkpoint whose logits tell tokens apart, `width` channels between the matrices of its FFN."""
    toy_model(family, gain=6.0, intermediate_size=width).to(dtype).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Checkpoint:
    """Our own model of a checkpoint."""
    return load_checkpoint(CheckpointConfig(path=str(folder), device="cpu", dtype="auto"))


def export(source: Path, scheme: str, form: str, folder: Path) -> Path:
    """One export; the folder."""
    export_checkpoint(loaded(source), Scheme.parse(scheme), form, folder)
    return folder


def token_ids() -> Tensor:
    """[2, 24]"""
    return torch.randint(1, 512, (2, 24), generator=torch.Generator().manual_seed(0))


def simulated_logits(source: Path, scheme: str) -> Tensor:
    """Logits of our simulated model, float32, from scales in the checkpoint's dtype."""
    checkpoint = loaded(source)
    config = QuantizeConfig(kernel="simulated")
    with (
        torch.no_grad(),
        quantized(checkpoint.model, Scheme.parse(scheme), config, scale_dtype=_scale_dtype(checkpoint)),
    ):
        logits: Tensor = checkpoint.model(token_ids()).logits
    return logits.float()


def dequantized_logits(source: Path, chosen: dict[str, Decoded]) -> Tensor:
    """Logits, as float32, of a plain model of the checkpoint's dtype that holds the real matrices, rounded to it."""
    model = AutoModelForCausalLM.from_pretrained(source)
    for name, decoded in chosen.items():
        linear = model.get_submodule(name)
        linear.weight.data = torch.from_numpy(decoded.real()).to(linear.weight.dtype)
    with torch.no_grad():
        logits: Tensor = model(token_ids()).logits
    return logits.float()


def chosen_codes(source: Path, scheme: str) -> dict[str, Decoded]:
    """What our quantizer chooses, by linear."""
    checkpoint = loaded(source)
    with prepared(checkpoint.model, Scheme.parse(scheme), scale_dtype=_scale_dtype(checkpoint)) as ready:
        return {name: as_decoded(ready.solve(name).quantized) for name in ready.linears}


def _scale_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return stored_dtype(checkpoint.model, checkpoint.info.source_precision)


def damaged(
    folder: Path, out: Path, change: Callable[[dict[str, Tensor], str], object], name: str
) -> RawFolder:
    """A copy of a folder of one file, its tensors changed; `name` is the linear that is passed on."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors, name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return RawFolder(out)


def linear_outputs(model: Any, names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each linear in one forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: (args[0], output)})

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with torch.no_grad():
        model(token_ids())
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == sorted(names)
    return seen


def assert_decoded(decoder: ModuleType, folder: Path, chosen: dict[str, Decoded]) -> None:
    """The decoder finds the same linears, codes and scales, bit for bit, with the digests of the MANIFEST."""
    raw = RawFolder(folder)
    assert decoder.linears(raw) == sorted(chosen)
    digests = read_manifest(folder)["tensors"]
    assert sorted(digests) == sorted(chosen)
    for name, expected in chosen.items():
        found = decoder.decode(raw, name)
        assert np.array_equal(found.codes_OI, expected.codes_OI)
        assert np.array_equal(found.scale_OG, expected.scale_OG)
        assert np.array_equal(found.real(), expected.real())
        assert found.digests() == expected.digests() == digests[name]

"""Weights of a checkpoint folder lent to a model that is too large for memory: one decoder layer at a time.

The model is built with its parameters on the meta device; its buffers are real, so that those which no checkpoint
holds (rotary frequencies) are right. A layer's weights are copied out of memory-mapped safetensors when it is entered
and dropped when it is left; one shard is mapped at a time, and anew after every 64 MB: what has been read of a mapped
file takes memory as long as it is mapped.

Of the token embedding only the rows of the text's tokens are read: its memory is reserved whole, but untouched pages
take none.
"""

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from probes.sites import decoder_layers, decoder_stack
from quantlab.config import CheckpointConfig
from quantlab.errors import CalibrationError
from quantlab.inspection.checkpoint import CheckpointInfo
from quantlab.inspection.folder import open_folder
from quantlab.inspection.safetensors_header import StoredTensor
from quantlab.models.loading import resolve_device, resolve_dtype

__all__ = ["FolderSource", "Lent", "must_stream", "open_lent"]

SHARE = 0.5
"""Of the memory that is free: a model above it is streamed, since statistics and activations need room too."""
_MAPPED = 64 << 20
"""Bytes that are read of a shard before it is mapped anew."""


@dataclass(frozen=True)
class Lent:
    """A model on the meta device and where its weights come from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: "FolderSource"


def must_stream(config: CheckpointConfig, info: CheckpointInfo, asked: bool | None = None) -> bool:
    """Whether the weights are to be streamed: as asked, else where they take more than half of the free memory.

    Raises:
        CalibrationError: a checkpoint that cannot be streamed is asked to be.
    """
    if asked is not None:
        if asked and info.kind == "gguf":
            raise CalibrationError(
                f"only safetensors can be streamed: {info.path} is a GGUF file, whose weights are held in memory. "
                "Leave --stream out."
            )
        return asked
    size = info.num_parameters * resolve_dtype(config.dtype, resolve_device(config.device)).itemsize
    return info.kind != "gguf" and size > SHARE * _free_memory()


def open_lent(config: CheckpointConfig, info: CheckpointInfo) -> Lent:
    """The model of a checkpoint folder, without its weights, and their source.

    Raises:
        CalibrationError: the folder stores packed weights, or other tensors than the model holds.
    """
    import quantlab.models  # noqa: F401  registers quantlab's own models

    device = resolve_device(config.device)
    values = AutoConfig.from_pretrained(info.path, trust_remote_code=config.trust_remote_code)
    if getattr(values, "quantization_config", None):
        raise CalibrationError(
            f"only plain weights can be streamed: those of {info.path} are packed (quantization_config). "
            "Leave --stream out."
        )
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(values), None)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            values,
            dtype=resolve_dtype(config.dtype, device),
            attn_implementation="sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager",
            trust_remote_code=config.trust_remote_code,
        )
    tokenizer = AutoTokenizer.from_pretrained(
        info.path, trust_remote_code=config.trust_remote_code, local_files_only=True
    )
    model.eval().requires_grad_(False)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return Lent(model, tokenizer, FolderSource(model, info.path, device))


class FolderSource:
    """Lends the weights of a folder to the layers of a model on the meta device."""

    def __init__(self, model: PreTrainedModel, folder: Path, device: torch.device) -> None:
        stored = open_folder(folder).tensors
        prefix = f"{model.base_model_prefix}."
        self.folder, self.device = folder, device
        self.stack_name, self.stack = decoder_stack(model)
        self.embedding = model.get_input_embeddings()
        self.layers = [layer for _, layer in decoder_layers(model)]
        # A checkpoint of the base model lacks its prefix.
        self.places = {
            name: next(
                ((own, stored[own]) for own in (name, name.removeprefix(prefix)) if own in stored), None
            )
            for name in model.state_dict()
        }

    @contextmanager
    def layer(self, name: str, layer: nn.Module) -> Iterator[None]:
        """Weights of one decoder layer; what the block has put in their place is left there."""
        with self._lent({f"{name}.{inner}": inner for inner in layer.state_dict()}, layer, None):
            yield
        _trim()

    @contextmanager
    def outside(self, ids: Tensor) -> Iterator[None]:
        """Weights of the decoder stack outside its layers; of the token embedding the rows of these ids."""
        inside = {id(tensor) for layer in self.layers for tensor in layer.state_dict(keep_vars=True).values()}
        prefix = f"{self.stack_name}." if self.stack_name else ""
        state = self.stack.state_dict(keep_vars=True)
        names = {prefix + name: name for name, tensor in state.items() if id(tensor) not in inside}
        with self._lent(names, self.stack, ids.unique()):
            yield

    @contextmanager
    def _lent(self, names: dict[str, str], module: nn.Module, ids: Tensor | None) -> Iterator[None]:
        """The tensors (full name -> name within the module) in place, and gone when the block ends."""
        taken: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        try:
            for file, held in self._portions(names):
                with safe_open(file, framework="pt") as shard:
                    for full, stored_name in held:
                        owner, leaf = _owner(module, names[full])
                        # Handed on, never kept: a view of the mapped file keeps the shard mapped.
                        lent = self._place(shard.get_tensor(stored_name), owner, leaf, full, ids)
                        taken += [(owner, leaf, *lent)] if lent else []
            yield
        finally:
            for owner, leaf, empty, lent_ in taken:
                if owner._parameters.get(leaf) is lent_:
                    owner._parameters[leaf] = empty

    def _portions(self, names: Iterable[str]) -> list[tuple[Path, list[tuple[str, str]]]]:
        """What is read of a shard at a time: each name and the one that it is stored under, shard after shard."""
        places = [(name, *self._stored(name)) for name in names]
        portions: list[tuple[Path, list[tuple[str, str]]]] = []
        size = 0
        for name, own, tensor in sorted(places, key=lambda place: (place[2].file, place[2].begin)):
            size += tensor.end - tensor.begin
            if not portions or portions[-1][0] != tensor.file or size > _MAPPED:
                portions.append((tensor.file, []))
                size = tensor.end - tensor.begin
            portions[-1][1].append((name, own))
        return portions

    def _stored(self, name: str) -> tuple[str, StoredTensor]:
        """The name that a tensor is stored under, and where."""
        place = self.places[name]
        if place is None:
            raise CalibrationError(
                f"a streamed checkpoint must store its tensors as the model names them: {self.folder} has no "
                f"{name!r}. Leave --stream out."
            )
        return place

    def _place(
        self, stored: Tensor, owner: nn.Module, leaf: str, full: str, ids: Tensor | None
    ) -> tuple[nn.Parameter, nn.Parameter] | None:
        """Copy a tensor to where it belongs; the empty parameter that stood there and the new one, None of a buffer."""
        self._checked(stored, owner, leaf, full)
        buffer, empty = owner._buffers.get(leaf), owner._parameters.get(leaf)
        if buffer is not None:
            buffer.copy_(stored)
        if empty is None:
            return None
        owner._parameters[leaf] = lent = self._copied(
            stored, empty.dtype, ids if owner is self.embedding else None
        )
        return empty, lent

    def _checked(self, stored: Tensor, owner: nn.Module, leaf: str, full: str) -> None:
        """The stored tensor must have the shape that the model asks for."""
        asked = getattr(owner, leaf).shape
        if stored.shape != asked:
            raise CalibrationError(
                f"tensors must agree with the config: {self.folder} holds {full!r} of shape {list(stored.shape)}, the "
                f"model asks for {list(asked)}."
            )

    def _copied(self, stored: Tensor, dtype: torch.dtype, rows: Tensor | None) -> nn.Parameter:
        """A copy in memory, whole or of some rows; the other rows hold anything."""
        copy = torch.empty(stored.shape, dtype=dtype, device=self.device)
        if rows is None:
            copy.copy_(stored)
        else:
            copy[rows.to(self.device)] = stored[rows.cpu()].to(self.device, dtype)
        return nn.Parameter(copy, requires_grad=False)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the tensor's name in it."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _trim() -> None:
    """Give freed memory back to the system: glibc keeps what lies between blocks that are still in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""What a checkpoint is, told from names, headers and its config before torch is imported.

`inspect_checkpoint` reads no weights: a file is opened only for its header, and every count in it is bounded first.
What passes here is safe to hand to transformers; values (NaN, Inf) and what only the model class knows are checked
while the weights load.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from quantlab.config import CheckpointConfig
from quantlab.errors import CheckpointError
from quantlab.inspection.architectures import OURS, check_config, check_sizes, sizes_of
from quantlab.inspection.compressed import CACHE_SCALES, unpacked
from quantlab.inspection.contents import Contents
from quantlab.inspection.families import family_of
from quantlab.inspection.folder import PICKLES, Folder, open_folder, refused_pickle
from quantlab.inspection.gguf_header import read_gguf
from quantlab.inspection.gguf_names import architecture_of, config_of, hf_name
from quantlab.inspection.layers import layers_of
from quantlab.inspection.precision import source_of_folder, source_of_gguf
from quantlab.inspection.resolving import resolve
from quantlab.inspection.shapes import check_one_block, check_shapes, linears_of
from quantlab.packaged import is_packaged

__all__ = [
    "CheckpointInfo",
    "content_hash",
    "contents_of",
    "inspect_checkpoint",
    "inspect_low_bit",
    "is_of",
    "resolve",
]

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype as the file names it, shape in torch's order)."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that can be loaded, as far as its names, headers and config tell."""

    path: Path
    """Folder or `.gguf` file on this machine."""
    kind: Literal["huggingface", "gguf"]
    name: str
    """What reports call it: the hub id, or the name of the folder or file."""
    model_type: str
    architecture: str
    """The model class that config.json names, or the GGUF file's architecture."""
    variant: str | None
    """Attention variant of quantlab's own models."""
    tensors: Tensors
    """As stored; a GGUF file's tensors under the names that transformers gives them."""
    num_parameters: int
    """Elements of all stored tensors: a tied lm_head that is not stored counts once."""
    source_precision: str
    """`bfloat16`, or `dequantized Q4_1` for a checkpoint whose floats are another grid's."""
    source_scheme: str | None
    """The scheme whose bits and groups the weights already have; see `precision`."""
    linears: Mapping[str, tuple[int, int]]
    """Name in the loaded model of every linear in its decoder layers -> (out_features, in_features)."""
    vocab_size: int
    """Rows of the input embedding; 0 where neither names nor config tell them, until it is loaded."""
    files: tuple[Path, ...]
    """Weight files."""
    carries: str | None = None
    """The scheme that a folder of low-bit weights is evaluated under, where it is loaded as what it is."""


def inspect_checkpoint(config: CheckpointConfig) -> CheckpointInfo:
    """Find a checkpoint, check all that can be told without its weights, and describe it.

    Raises:
        CheckpointError: it is missing, unsafe, damaged, of an unknown architecture, or disagrees with its config.
    """
    path = resolve(config.path, config.revision, trust_remote_code=config.trust_remote_code)
    if path.is_dir():
        on_hub = not is_packaged(config.path) and not Path(config.path).expanduser().exists()
        name = config.path if on_hub else path.resolve().name
        return _inspect_folder(path, name, open_folder(path), trust_remote_code=config.trust_remote_code)
    if path.suffix == ".gguf":
        return _inspect_gguf(path)
    if path.suffix in PICKLES:
        raise refused_pickle(path)
    hint = f" Name its folder instead: {path.parent}." if path.suffix == ".safetensors" else ""
    raise CheckpointError(f"checkpoint must be a folder or a .gguf file: {path} is neither.{hint}")


def content_hash(info: CheckpointInfo) -> str:
    """SHA-256 of all that decides a score: weights, config, tokenizer; of contents, never of places or times.

    Renaming or moving the checkpoint keeps it; one changed bit in one file changes it.
    """
    return contents_of(info).sha256


def contents_of(info: CheckpointInfo) -> Contents:
    """All that decides a score, to be looked at again when it is read."""
    return Contents.of(info.path, info.files)


def inspect_low_bit(path: Path, linears: Collection[str], source: str) -> CheckpointInfo:
    """A folder of low-bit weights in whatever format, of which only what keeps its precision is checked here.

    Args:
        linears: names of those in low bits; their tensors are left to the format's decoder.
        source: what reports call its precision.

    Raises:
        CheckpointError: as `inspect_checkpoint`.
    """
    folder = open_folder(path)
    model_type = check_config(folder.config, path / "config.json", trust_remote_code=False)
    tensors = {
        name: (tensor.dtype, tensor.shape)
        for name, tensor in folder.tensors.items()
        if (not is_of(name, linears) or name.endswith(".bias")) and not name.endswith(CACHE_SCALES)
    }
    name = path.resolve().name
    return _info(
        path, "huggingface", name, model_type, folder.config, tensors, (source, None), folder.weights
    )


def is_of(tensor: str, modules: Collection[str]) -> bool:
    """Whether a tensor lies in one of the modules, going by its name."""
    parts = tensor.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))


def _inspect_folder(path: Path, name: str, folder: Folder, *, trust_remote_code: bool) -> CheckpointInfo:
    config_file = path / "config.json"
    model_type = check_config(folder.config, config_file, trust_remote_code=trust_remote_code)
    source = source_of_folder(folder.config, folder.tensors, path)
    quantization = folder.config.get("quantization_config")
    tensors = unpacked(folder.tensors, quantization, path)
    info = _info(path, "huggingface", name, model_type, folder.config, tensors, source, folder.weights)
    check_one_block(folder.tensors, layers_of(folder.config, sizes_of(folder.config, path)), path)
    return replace(info, carries=source[1]) if source[0] == f"quantlab {source[1]}" else info


def _inspect_gguf(path: Path) -> CheckpointInfo:
    header = read_gguf(path)
    config = config_of(header, path)
    architecture = architecture_of(header, path)
    check_sizes(sizes_of(config, path), path)
    tensors = {}
    for stored_name, tensor in header.tensors.items():
        name, stored = hf_name(stored_name, architecture, path)
        shape = tensor.shape[::-1] if stored == "transposed" else tensor.shape
        tensors[name] = (tensor.type.name, shape)
    source = source_of_gguf(header.tensors)
    return _info(path, "gguf", path.stem, architecture.model_type, config, tensors, source, (path,))


def _info(
    path: Path,
    kind: Literal["huggingface", "gguf"],
    name: str,
    model_type: str,
    config: Mapping[str, Any],
    tensors: Tensors,
    source: tuple[str, str | None],
    files: tuple[Path, ...],
) -> CheckpointInfo:
    sizes = sizes_of(config, path)
    layers = layers_of(config, sizes)
    variant = str(config.get("variant", "standard")) if model_type == OURS else None
    family = family_of(model_type, variant)
    vocab_size = check_shapes(tensors, sizes, layers, family, path)
    architectures = config.get("architectures")
    return CheckpointInfo(
        path=path,
        kind=kind,
        name=name,
        model_type=model_type,
        architecture=str(architectures[0])
        if isinstance(architectures, list) and architectures
        else model_type,
        variant=variant,
        tensors=tensors,
        num_parameters=sum(prod(shape) for _, shape in tensors.values()),
        source_precision=source[0],
        source_scheme=source[1],
        linears=linears_of(tensors, layers, family),
        vocab_size=vocab_size,
        files=files,
    )

"""A checkpoint folder in Hugging Face format: config.json, and weights in one safetensors file or in shards.

The index of the shards is not trusted: it may only name plain files of this folder, each of which must hold exactly
what the index says. Pickles run code when they are read, so they are refused with the way to convert them. No torch.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import CheckpointError
from quantlab.inspection.safetensors_header import (
    MAX_JSON_BYTES,
    StoredTensor,
    read_header,
    read_json,
    regular_file,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\\0:]{0,240}\.safetensors")
"""A plain name of a file."""
_TOKENIZERS = ("tokeniz", "vocab", "merges", "spiece", "tiktoken", "tekken")
"""What the names of tokenizer files of all kinds hold."""
_READ = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json",
)  # fmt: skip
"""What transformers reads beside config.json, as objects."""
_TEMPLATES = "additional_chat_templates"
_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".py", ".tiktoken")
"""Of files that transformers may open; weights are checked as they are read."""
MAX_FILE_BYTES = {".json": 64_000_000, ".jinja": 1_000_000, "": 64_000_000}
"""Suffix -> largest file that is opened, weights aside; the longest tokenizer.json that is public has 35 MB."""
MAX_TOKENIZER_VALUES = 4_000_000
"""Commas and opening brackets in a tokenizer.json; one of 262,000 tokens with merges has two million."""
MAX_SHARDS = 10_000
MAX_DEPTH = 100
"""Objects and lists within each other: what walks them later may not go as deep as what reads them."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Folder:
    """What a checkpoint folder holds, without its weights."""

    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    """The safetensors files that transformers will read, in the order of their names."""
    tensors: Mapping[str, StoredTensor]


def open_folder(path: Path) -> Folder:
    """Read config.json and the headers of all weights.

    Raises:
        CheckpointError: something is missing, damaged, unsafe, or of another format.
    """
    config_file = path / "config.json"
    if not (config_file.exists() or config_file.is_symlink()):
        raise CheckpointError(f"not a checkpoint: {path} {_instead_of_config(path)}.")
    config = read_object(inside(config_file))
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"checkpoint must be a whole model: {path} holds an adapter (adapter_config.json). Merge it into its "
            f"base model first."
        )
    _check_files(path)
    files, mapping = _weight_files(path)
    listed = _by_shard(mapping or {})
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        header = read_header(inside(file))
        if twice := tensors.keys() & header.keys():
            raise CheckpointError(
                f"shards must not share tensors: {file} holds {min(twice)!r} a second time."
            )
        tensors |= header
        if mapping is not None:
            _check_shard(file, listed[file.name], header)
    if not tensors:
        raise CheckpointError(f"checkpoint must hold weights: {path} holds no tensor.")
    if not any(name in file.name for file in path.iterdir() for name in _TOKENIZERS):
        raise CheckpointError(
            f"checkpoint must hold its tokenizer: {path} has no tokenizer.json. Save the tokenizer beside the weights."
        )
    return Folder(config, tuple(files), tensors)


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object, of at most MAX_JSON_BYTES and MAX_DEPTH."""
    if regular_file(path).st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"checkpoint file is damaged: {path} is larger than {MAX_JSON_BYTES} bytes.")
    tree = read_json(path.read_bytes(), path)
    check_depth(tree, path)
    return tree


def check_depth(tree: Any, path: Path) -> None:
    """A JSON tree of at most MAX_DEPTH; level by level, without recursion."""
    level = [tree]
    for _ in range(MAX_DEPTH):
        below = [value for node in level for value in (node.values() if isinstance(node, dict) else node)]
        level = [value for value in below if isinstance(value, dict | list)]
        if not level:
            return
    raise CheckpointError(f"checkpoint file is damaged: {path} is nested more than {MAX_DEPTH} deep.")


def _check_files(path: Path) -> None:
    """Every file that transformers may open lies in the folder, is a file, is not too large, and is JSON if it should.

    Raises:
        CheckpointError: a link that leads out, a pipe or device, or a file that is too large or damaged.
    """
    for file in sorted(path.iterdir()):
        if file.name == _TEMPLATES:
            for template in sorted(inside(file).iterdir()) if file.is_dir() else ():
                _check_file(template)
        elif file.suffix in _SUFFIXES and file.name != INDEX:
            _check_file(file)
    for name in _READ:
        if (path / name).exists():
            read_object(path / name)
    tokenizer = path / "tokenizer.json"
    if tokenizer.exists():
        text = tokenizer.read_bytes()
        if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MAX_TOKENIZER_VALUES:
            raise CheckpointError(
                f"checkpoint file is damaged: {tokenizer} lists more than {MAX_TOKENIZER_VALUES} values."
            )


def _check_file(file: Path) -> None:
    limit = MAX_FILE_BYTES.get(file.suffix, MAX_FILE_BYTES[""])
    if regular_file(inside(file)).st_size > limit:
        raise CheckpointError(f"checkpoint file is damaged: {file} is larger than {limit} bytes.")


def inside(path: Path) -> Path:
    """The path, whose file must lie in its own folder (or among the blobs of a hub snapshot, where links lead)."""
    try:
        folder, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint file must be readable: {path} leads in a ring.") from error
    roots = [folder]
    if folder.parent.name == "snapshots":
        roots.append(folder.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{'weights' if path.suffix == '.safetensors' else 'files'} must lie in the checkpoint's folder: {path} is "
            f"a link to {target}."
        )
    return path


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and for shards the index's mapping of tensors to files."""
    if (path / SINGLE).exists() or (path / SINGLE).is_symlink():
        return [path / SINGLE], None
    if (path / INDEX).exists() or (path / INDEX).is_symlink():
        mapping = _index(path / INDEX)
        return [path / name for name in sorted(set(mapping.values()))], mapping
    raise _no_weights(path)


def _index(file: Path) -> dict[str, str]:
    """The weight_map of an index, whose shards are plain names of safetensors files in its folder."""
    mapping = read_object(inside(file)).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"shard index must map tensors to files: {file} has no weight_map.")
    for tensor, shard in mapping.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard) or not shard.isprintable():
            raise CheckpointError(
                f"shard index must name safetensors files of its own folder: {file} sends {tensor!r} to {shard!r}."
            )
    shards = set(mapping.values())
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(
            f"shard index must name at most {MAX_SHARDS} files: {file} names {len(shards)} of them."
        )
    there = {path.name for path in file.parent.iterdir()}
    if missing := shards - there:
        shard = min(missing)
        tensor = next(tensor for tensor in mapping if mapping[tensor] == shard)
        raise CheckpointError(f"shard is missing: {file} sends {tensor!r} to {shard!r}, which is not there.")
    return mapping


def _by_shard(mapping: Mapping[str, str]) -> dict[str, set[str]]:
    """Shard -> names of its tensors."""
    listed: dict[str, set[str]] = {}
    for name, shard in mapping.items():
        listed.setdefault(shard, set()).add(name)
    return listed


def _check_shard(file: Path, listed: set[str], held: Mapping[str, StoredTensor]) -> None:
    if missing := listed - held.keys():
        raise CheckpointError(
            f"shard lacks a tensor: {file} does not hold {min(missing)!r}, as its index says."
        )
    if extra := held.keys() - listed:
        raise CheckpointError(
            f"shard holds a tensor too many: {file} has {min(extra)!r}, unknown to its index."
        )


def _no_weights(path: Path) -> CheckpointError:
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        return refused_pickle(pickles[0])
    others = sorted(file.name for file in path.glob("*.safetensors"))
    found = f"its safetensors files are {', '.join(others[:3])}" if others else "it has no safetensors file"
    return CheckpointError(
        f"checkpoint must hold its weights in {SINGLE} or in shards with {INDEX}: {path}: {found}."
    )


def refused_pickle(path: Path) -> CheckpointError:
    """The refusal of a pickle, with a line that converts its folder where its author is trusted."""
    source, target = json.dumps(str(path.parent)), json.dumps(f"{path.parent}-safetensors")
    code = (
        f"from transformers import AutoModelForCausalLM as Model, AutoTokenizer as Tokenizer; "
        f"Model.from_pretrained({source}).save_pretrained({target}); "
        f"Tokenizer.from_pretrained({source}).save_pretrained({target})"
    )
    return CheckpointError(
        f"weights must be safetensors: {path} is a pickle, which can run code when it is read. If you trust its "
        f"author, convert it: python -c {shlex.quote(code)}"
    )


def _instead_of_config(path: Path) -> str:
    """What a folder without config.json holds that a user may have meant."""
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        return f"has no config.json; to use its GGUF file, name the file: {ggufs[0]}"
    if any(file.suffix in PICKLES for file in path.iterdir()):
        return "has no config.json, and its weights are pickles, which quantlab does not read"
    return "has no config.json"

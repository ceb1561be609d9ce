"""Bad folders: the shard index, what it points at, and what else lies in a folder (B1-B3, B8, B18, B19)."""

# ruff: noqa: E501  a case, a line

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from tests.hostile.case import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Case,
    Damage,
    both,
    canary,
    linked,
    moved_out,
    sparse,
    without,
    written,
)

UP = "model.layers.1.mlp.up_proj.weight"
LAYER = {0: "shard-0.safetensors", 1: "shard-1.safetensors"}


def indexed(change: Callable[[dict[str, Any], Path], Any]) -> Damage:
    """Change the weight_map of a sharded checkpoint."""

    def damage(it: Path) -> None:
        index = json.loads((it / INDEX).read_text())
        change(index["weight_map"], it)
        (it / INDEX).write_text(json.dumps(index))

    return damage


def pointed(place: str) -> Damage:
    """Send one tensor to another file; a good copy of its shard waits outside."""

    def change(places: dict[str, Any], it: Path) -> None:
        shutil.copy(it / places[UP], it.parent / "outside" / "x.safetensors")
        places[UP] = place

    return indexed(change)


def _again(places: dict[str, Any], it: Path) -> None:
    other = LAYER[places[UP] == LAYER[0]]
    tensors = load_file(it / other)
    save_file(tensors | {UP: load_file(it / places[UP])[UP]}, it / other, {"format": "pt"})


def _shard(make: Callable[[Path], object]) -> Damage:
    def damage(it: Path) -> None:
        (it / LAYER[0]).unlink()
        make(it / LAYER[0])

    return damage


def _crowd(places: dict[str, Any], it: Path) -> None:
    """Twenty thousand shards of one tensor of no elements."""
    from tests.hostile.case import entry, packed

    for number in range(20_000):
        (it / f"e{number}.safetensors").write_bytes(
            packed({f"e{number}": entry(shape=[0], offsets=[0, 0])}, b"")
        )
        places[f"e{number}"] = f"e{number}.safetensors"


class Payload:
    """Unpickled, creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def _pickled(name: str, make: Callable[[Path], Any], protocol: int = 2) -> Damage:
    def damage(it: Path) -> None:
        content = make(it)
        (it / name).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))

    return damage


def _zip(write: Callable[[zipfile.ZipFile, Path], object]) -> Callable[[Path], bytes]:
    def make(it: Path) -> bytes:
        blob = io.BytesIO()
        with zipfile.ZipFile(blob, "w") as archive:
            write(archive, it)
        return blob.getvalue()

    return make


def _torch_zip(archive: zipfile.ZipFile, it: Path) -> None:
    archive.writestr("archive/data.pkl", pickle.dumps(Payload(canary(it)), 2))
    archive.writestr("archive/version", "3")


def _stride_zero(it: Path) -> bytes:
    """A .pt of a few bytes whose one tensor says it has 2^40 elements."""
    import torch

    blob = io.BytesIO()
    torch.save({"a": torch.zeros(1).as_strided((2**20, 2**20), (0, 0))}, blob)
    return blob.getvalue()


def _global(it: Path) -> bytes:
    return b"cbuiltins\nexec\n(Vopen(" + repr(str(canary(it))).encode() + b", 'w')\ntR."


def _tar(it: Path) -> bytes:
    blob = io.BytesIO()
    with tarfile.open(fileobj=blob, mode="w") as archive:
        link = tarfile.TarInfo("model/link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../outside"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("model/link/config.json"))
    return blob.getvalue()


def _slip(archive: zipfile.ZipFile, it: Path) -> None:
    archive.writestr("../outside/slipped", "x")
    archive.writestr("config.json", "{}")


def _twice(archive: zipfile.ZipFile, it: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("config.json", "{}")
        archive.writestr("config.json", '{"model_type": "llama"}')


def _alone(name: str, make: Callable[[Path], Any]) -> Damage:
    """One file in an empty folder, which is opened itself."""

    def damage(it: Path) -> Path:
        _pickled(name, make)(it)
        return it / name

    return damage


def _pickle_case(name: str, classes: str, file: str, make: Callable[[Path], Any], protocol: int = 2) -> Case:
    return Case(name, classes, both(without("pytorch_model.bin"), _pickled(file, make, protocol)),
                "is a pickle, which can run code", base="pickles")  # fmt: skip


def _payload(it: Path) -> Payload:
    return Payload(canary(it))


PICKLES = [
    Case("pickle of honest weights", "B1", lambda it: None, "is a pickle", base="pickles"),
    _pickle_case("pickle that runs os.system", "B1", "pytorch_model.bin", _payload),
    _pickle_case("pickle of protocol 0 that runs os.system", "B1", "pytorch_model.bin", _payload, 0),
    _pickle_case("zip of torch that runs os.system", "B1", "pytorch_model.bin", _zip(_torch_zip)),
    _pickle_case("pickle named model.pt", "B1", "model.pt", _payload),
    _pickle_case("pickle that needs globals", "B2", "pytorch_model.bin", _global),
    _pickle_case("pickle of a class that is not there", "B2", "model.ckpt", lambda it: b"cno_such_module\nThing\n)R."),
    _pickle_case("pickle of a getattr chain", "B2", "model.pth", lambda it: b"cbuiltins\ngetattr\n(cos\nsystem\nV__call__\ntR."),
    Case("pickle that is named itself", "B2", _alone("model.pkl", _payload), "is a pickle", base="empty"),
    _pickle_case("stride-0 bomb", "B3", "pytorch_model.bin", _stride_zero),
    _pickle_case("stride-0 bomb named .pt", "B3", "model.pt", _stride_zero),
    Case("stride-0 bomb named itself", "B3", _alone("model.pt", _stride_zero), "is a pickle", base="empty"),
    Case("pickle with a safetensors name", "B1 B2", both(written(WEIGHTS, b""), _pickled(WEIGHTS, _payload)),
         "are allowed|truncated", tools=("transformers", "safetensors")),
    Case("index of pickles", "B1 B8", both(_pickled("pytorch_model-00001-of-00001.bin", _payload), without(WEIGHTS),
         written("pytorch_model.bin.index.json", {"weight_map": {UP: "pytorch_model-00001-of-00001.bin"}})), "is a pickle"),
    Case("index sends a tensor to a pickle", "B1 B8", both(_pickled("evil.bin", _payload), pointed("evil.bin")),
         "files of its own folder: .* to 'evil.bin'", base="shards"),
    Case("good: an evil pickle beside the weights is not read", "B1", _pickled("training_args.bin", _payload), "", loads=True),
    Case("good: an evil rng_state.pth beside the weights is not read", "B1", _pickled("rng_state.pth", _payload), "", loads=True),
]  # fmt: skip

INDEXES = [
    Case("index to ../", "B8", pointed("../outside/x.safetensors"), "files of its own folder: .* to '../outside", base="shards"),
    Case("index to it/../..", "B8", pointed("it/../../outside/x.safetensors"), "files of its own folder", base="shards"),
    Case("index to an absolute path", "B8", pointed("/etc/x.safetensors"), "files of its own folder: .* to '/etc", base="shards"),
    Case("index with backslashes", "B8", pointed("..\\outside\\x.safetensors"), "files of its own folder", base="shards"),
    Case("index to a URL", "B8", pointed("https://example.org/x.safetensors"), "files of its own folder", base="shards"),
    Case("index to a NUL", "B8", pointed("shard-0\0.safetensors"), "files of its own folder", base="shards"),
    Case("index to an empty name", "B8", pointed(""), "files of its own folder", base="shards"),
    Case("index to a hidden file", "B8", both(pointed(".safetensors")), "is not there", base="shards"),
    Case("index to a number", "B8", indexed(lambda places, it: places.update({UP: 3})), "files of its own folder: .* to 3", base="shards"),
    Case("index to a list", "B8", indexed(lambda places, it: places.update({UP: [LAYER[0]]})), "files of its own folder", base="shards"),
    Case("shard missing", "B8", pointed("shard-7.safetensors"), "shard is missing", base="shards"),
    Case("shard name of 10 KB", "B8 B20", pointed("s" * 10_000 + ".safetensors"), "shard", base="shards"),
    Case("shard name with an escape", "B8 B20", both(written("a\x1b[2J.safetensors", b"x"), pointed("a\x1b[2J.safetensors")),
         "own folder|damaged", base="shards"),
    Case("tensor twice", "B8", indexed(_again), "a second time|a tensor too many", base="shards"),
    Case("tensor not in its shard", "B8", indexed(lambda places, it: places.update({"model.x": LAYER[0]})), "shard lacks a tensor", base="shards"),
    Case("tensor unknown to the index", "B8", indexed(lambda places, it: places.pop(UP)), "unknown to its index", base="shards"),
    Case("tensor in the other shard", "B8", indexed(lambda places, it: places.update({UP: LAYER[places[UP] == LAYER[0]]})),
         "shard lacks a tensor|a tensor too many", base="shards"),
    Case("index names a tensor twice", "B8", written(INDEX, '{"weight_map": {"a": "shard-0.safetensors", "a": "shard-1.safetensors"}}'),
         "names 'a' twice", base="shards"),
    Case("weight_map a list", "B8", written(INDEX, {"weight_map": [UP]}), "has no weight_map", base="shards"),
    Case("weight_map empty", "B8", written(INDEX, {"weight_map": {}}), "has no weight_map", base="shards"),
    Case("index is a list", "B8", written(INDEX, []), "must hold a JSON object", base="shards"),
    Case("index not UTF-8", "B8 B17", written(INDEX, b"\xff\xfe{}"), "is not UTF-8", base="shards"),
    Case("index nested 100,000 deep", "B8 B17", written(INDEX, b'{"weight_map":' * 100_000), "valid JSON", base="shards"),
    Case("index of 1 GB", "B8 B17", sparse(INDEX, 1 << 30), "is larger than", base="shards"),
    Case("index of 4 million empty lists", "B8 B17", written(INDEX, b'{"weight_map":[' + b"[]," * 4_000_000 + b"[]]}"),
         "lists more than|larger than", base="shards"),
    Case("20,000 shards", "B8", indexed(_crowd), "at most .* files", base="shards"),
    Case("shard a link out", "B8 B19", moved_out(LAYER[0]), "is a link to", base="shards"),
    Case("shard a pipe", "B8 B19", _shard(os.mkfifo), "must be a regular file", base="shards"),
    Case("shard a folder", "B8 B19", _shard(Path.mkdir), "must be a regular file", base="shards"),
    Case("shard /dev/zero", "B8 B19", linked(LAYER[0], "/dev/zero"), "is a link to", base="shards"),
    Case("index a link out", "B8 B19", moved_out(INDEX), "is a link to", base="shards"),
    Case("index a pipe", "B8 B19", both(without(INDEX), lambda it: os.mkfifo(it / INDEX)), "must be a regular file", base="shards"),
    Case("good: two shards", "B8", lambda it: None, "", base="shards", loads=True),
]  # fmt: skip


def _piped(name: str) -> Damage:
    def damage(it: Path) -> None:
        (it / name).unlink(missing_ok=True)
        os.mkfifo(it / name)

    return damage


def _snapshot(it: Path) -> Path:
    """A hub's cache: every file of the snapshot is a link to a blob."""
    blobs, snapshot = it / "models--a--b/blobs", it / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in it.iterdir() if path.is_file())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


FOLDERS = [
    Case("config a link out", "B19", moved_out(CONFIG), "is a link to"),
    Case("config a pipe", "B19", _piped(CONFIG), "must be a regular file"),
    Case("config /dev/zero", "B19", linked(CONFIG, "/dev/zero"), "is a link to|regular file"),
    Case("tokenizer a link out", "B19", moved_out("tokenizer.json"), "is a link to"),
    Case("tokenizer a pipe", "B19", _piped("tokenizer.json"), "must be a regular file"),
    Case("tokenizer_config a pipe", "B19", _piped("tokenizer_config.json"), "must be a regular file"),
    Case("generation_config a pipe", "B19", _piped("generation_config.json"), "must be a regular file"),
    Case("generation_config a link to /etc", "B19", linked("generation_config.json", "/etc/hostname"), "is a link to"),
    Case("special_tokens_map a link out", "B19", linked("special_tokens_map.json", "/etc/hostname"), "is a link to"),
    Case("chat template a link out", "B19 B22", linked("chat_template.jinja", "/etc/hostname"), "is a link to"),
    Case("chat template a pipe", "B19 B22", _piped("chat_template.jinja"), "must be a regular file"),
    Case("more chat templates a link out", "B19 B22", linked("additional_chat_templates", "../outside"), "is a link to"),
    Case("adapter_config a pipe", "B19 B30", _piped("adapter_config.json"), "must be"),
    Case("zip with ../", "B18", _alone("model.zip", _zip(_slip)), "must be a folder or a .gguf", base="empty"),
    Case("zip with a name twice", "B18", _alone("model.nemo", _zip(_twice)), "must be a folder or a .gguf", base="empty"),
    Case("tar with a link", "B18", _alone("model.tar", _tar), "must be a folder or a .gguf", base="empty"),
    Case("zip named .safetensors", "B18", both(without(WEIGHTS), _pickled(WEIGHTS, _zip(_slip))), "are allowed|truncated",
         tools=("transformers", "safetensors")),
    Case("zip named .gguf", "B18", _alone("model.gguf", _zip(_slip)), "must start with 'GGUF'|truncated", base="empty", tools=("gguf",)),
    Case("a folder of an archive alone", "B18", _pickled("model.zip", _zip(_slip)), "has no config.json", base="empty"),
    Case("/dev/zero itself", "B19", lambda it: Path("/dev/zero"), "must be a folder or a .gguf", base="empty"),
    Case("a pipe named .gguf", "B19", lambda it: (os.mkfifo(it / "x.gguf"), it / "x.gguf")[1], "must be a regular file", base="empty"),
    Case("good: a snapshot of the hub, all links to its blobs", "B19", _snapshot, "", loads=True),
]  # fmt: skip

CASES = [*PICKLES, *INDEXES, *FOLDERS]

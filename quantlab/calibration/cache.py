"""Calibrations on disk: a folder named by the hash of what made it, one file a decoder layer, read when it is needed.

    runs/calibration/KEY/index.json                   what made it, and the SHA-256 of every file
                         ids.safetensors              the tokens
                         model.layers.3.safetensors   statistics of one layer; one Gram matrix for each distinct input

The key covers the checkpoint's content, the tokens, dtype, dtype of the sums, transforms, the format's version, the
version of transformers and the sources that decide the numbers. Device and batch size change rounding alone. A folder
gets its name when it is complete. Until then each finished layer is kept: after a kill the same call runs those layers
again, to have their outputs, but sums nothing for them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantlab.calibration.accumulators import unseen
from quantlab.calibration.collect import BlockStats, Calibration, collect_blocks
from quantlab.calibration.statistics import AttentionStats, LinearStats, Ranges
from quantlab.calibration.stream import Source, check_ids
from quantlab.errors import CalibrationError, OutputError
from quantlab.export.atomic import fsync
from quantlab.records import fingerprint
from quantlab.sweep.store import RunStore

__all__ = ["FOLDER", "FORMAT_VERSION", "calibrated", "linear_facts", "open_calibration"]

FORMAT_VERSION = 1
"""Of the files; one more with every change of what they hold or mean."""
FOLDER = Path("runs/calibration")
"""Where calibrations go unless the configuration says otherwise."""

_SOURCES = ("probes", "quantlab/calibration", "quantlab/layers", "quantlab/models")
"""Packages that decide what is summed."""
_VALUES = ("minimum_I", "maximum_I", "mean_I")
_RANGES = ("query", "key", "value")


def calibrated(
    model: nn.Module,
    ids_NT: Tensor,
    *,
    folder: Path,
    checkpoint: str,
    transforms: str = "",
    batch_size: int = 8,
    accumulate: torch.dtype = torch.float32,
    source: Source | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Calibration:
    """The calibration of a model, from disk where it is there, else computed and stored a layer at a time.

    Args:
        folder: where calibrations are kept.
        checkpoint: hash of the checkpoint's content.
        transforms: what was done to the weights since they were loaded, empty for nothing.
        Others: those of `collect.collect_blocks`.

    Raises:
        CalibrationError: as `collect.collect_blocks`, or what is stored is damaged or not what its name says.
        OutputError: the folder cannot be written.
    """
    check_ids(ids_NT)
    made_by = {
        "format_version": FORMAT_VERSION,
        "checkpoint": checkpoint,
        "tokens": hashlib.sha256(ids_NT.long().cpu().numpy().tobytes()).hexdigest(),
        "shape": list(ids_NT.shape),
        "dtype": _name(next(model.parameters()).dtype),
        "accumulate": _name(accumulate),
        "transforms": transforms,
        "transformers": version("transformers"),
        "code": _code(),
    }
    key = fingerprint(made_by)
    with RunStore(folder).claim(key):
        if not (folder / key).exists():
            try:
                partial = _Partial(folder / f".{key}.partial", made_by)
                for block in collect_blocks(
                    model,
                    ids_NT,
                    batch_size=batch_size,
                    accumulate=accumulate,
                    source=source,
                    is_known=partial.has,
                    advance=advance,
                ):
                    partial.put(block)
                    # Gone before the next layer is summed.
                    del block
                partial.finish(ids_NT, folder / key)
            except OSError as error:
                raise OutputError(
                    f"calibration must be writable: {folder / key}: {error.strerror}."
                ) from error
        return open_calibration(folder / key, made_by)


def open_calibration(path: Path, made_by: Mapping[str, Any] | None = None) -> Calibration:
    """The calibration in a folder; its layers are read, and checked against their digests, when they are asked for.

    Args:
        made_by: what it must have been made by, where that is known.

    Raises:
        CalibrationError: damaged, of another format version, or made by something else.
    """
    try:
        index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        found, layers = index["made_by"], index["layers"]
        format_version = found["format_version"]
        if format_version == FORMAT_VERSION:
            _check_digest(path / "ids.safetensors", index["ids"])
            ids_NT = load_file(path / "ids.safetensors")["ids_NT"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _damaged(path / "index.json", f"{type(error).__name__}: {error}") from error
    if format_version != FORMAT_VERSION:
        raise CalibrationError(
            f"a stored calibration must be of format version {FORMAT_VERSION}: {path} is of version {format_version}. "
            "Delete the folder; the next run makes it again."
        )
    for name, value in (made_by or {}).items():
        if found.get(name) != value:
            raise CalibrationError(
                f"a stored calibration must be of this checkpoint, text and settings: {path} was made by {name} "
                f"{found.get(name)!r}, asked for is {value!r}. Delete the folder; the next run makes it again."
            )
    files = {
        name: _LayerFile(path / f"{name}.safetensors", entry["sha256"]) for name, entry in layers.items()
    }
    linears = {each: files[name] for name, entry in layers.items() for each in entry["linears"]}
    attention = {each: files[name] for name, entry in layers.items() for each in entry["attention"]}
    return Calibration(
        ids_NT, _Lazy(linears, _LayerFile.linear), _Lazy(attention, _LayerFile.attention), path.name
    )


class _Partial:
    """The layers of a calibration that is not complete."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.made_by = path, made_by
        for leftover in path.glob("*.tmp"):
            leftover.unlink()

    def has(self, layer: str) -> bool:
        """Whether a layer is there; it got its name when it was whole."""
        return (self.path / f"{layer}.safetensors").exists()

    def put(self, block: BlockStats) -> None:
        """Store one layer."""
        tensors: dict[str, Tensor] = {}
        grams: dict[int, str] = {}
        linears: dict[str, Any] = {}
        for name, stats in block.linears.items():
            gram = None
            if stats.num_tokens:
                gram = grams.setdefault(id(stats.gram_II), f"gram.{len(grams)}")
                tensors[gram] = stats.gram_II
            linears[name] = {"gram": gram, "dtype": _name(stats.gram_II.dtype), **_facts(stats)}
            tensors |= {f"{name}.{value}": getattr(stats, value).clone() for value in _VALUES}
        for name, attention in block.attention.items():
            for which in _RANGES:
                ranges = getattr(attention, which)
                tensors[f"{name}.{which}.minimum_HC"] = ranges.minimum_HC
                tensors[f"{name}.{which}.maximum_HC"] = ranges.maximum_HC
        about = json.dumps({"linears": linears, "attention": list(block.attention)})
        self._write(f"{block.name}.safetensors", tensors, {"about": about})

    def finish(self, ids_NT: Tensor, destination: Path) -> None:
        """Give the complete folder its name."""
        layers = {}
        for file in sorted(self.path.glob("*.safetensors"), key=lambda file: _natural(file.stem)):
            if file.stem != "ids":
                about = _about(file)
                layers[file.stem] = {"sha256": _digest(file), **about}
        self._write("ids.safetensors", {"ids_NT": ids_NT.long().cpu().contiguous()}, {})
        index = {"made_by": self.made_by, "ids": _digest(self.path / "ids.safetensors"), "layers": layers}
        (self.path / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        fsync(self.path / "index.json")
        self.path.rename(destination)
        fsync(destination.parent)

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        temporary = self.path / f"{name}.tmp"
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OutputError(f"calibration must be writable: {temporary}: {error}.") from error
        temporary.chmod(0o644)  # the library makes files that only their owner may read
        fsync(temporary)
        temporary.replace(self.path / name)


class _LayerFile:
    """The statistics of one layer on disk."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest
        self._about: dict[str, Any] | None = None
        # Linears that share a Gram matrix are given one tensor, as long as someone holds it.
        self._grams: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def linear(self, name: str) -> LinearStats:
        """Statistics of one linear."""
        about = self._checked()["linears"][name]
        with safe_open(self.path, framework="pt") as file:
            minimum_I, maximum_I, mean_I = (file.get_tensor(f"{name}.{value}").clone() for value in _VALUES)
            if about["gram"] is None:
                return unseen(len(mean_I), getattr(torch, about["dtype"]))
            gram_II = self._grams.get(about["gram"])
            if gram_II is None:
                self._grams[about["gram"]] = gram_II = file.get_tensor(about["gram"]).clone()
        return LinearStats(gram_II, minimum_I, maximum_I, mean_I, about["num_tokens"])

    def attention(self, name: str) -> AttentionStats:
        """Ranges of one attention layer."""
        self._checked()
        with safe_open(self.path, framework="pt") as file:
            ranges = [
                Ranges(
                    *(file.get_tensor(f"{name}.{which}.{end}_HC").clone() for end in ("minimum", "maximum"))
                )
                for which in _RANGES
            ]
        return AttentionStats(*ranges)

    def _checked(self) -> dict[str, Any]:
        """What the file says of itself, once its content is known to be what was written."""
        if self._about is None:
            _check_digest(self.path, self.digest)
            self._about = _about(self.path)
        return self._about


class _Lazy(Mapping[str, Any]):
    """Statistics by name, read from their layer's file at each look."""

    def __init__(self, files: Mapping[str, _LayerFile], read: Callable[[_LayerFile, str], Any]) -> None:
        self._files, self._read = files, read

    def __getitem__(self, name: str) -> Any:
        return self._read(self._files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files


def linear_facts(path: Path) -> dict[str, dict[str, Any]]:
    """in_features, num_tokens, num_dead and num_constant of every linear, read from the index alone."""
    layers = json.loads((path / "index.json").read_text(encoding="utf-8"))["layers"]
    return {name: facts for entry in layers.values() for name, facts in entry["linears"].items()}


def _facts(stats: LinearStats) -> dict[str, int]:
    """What a method may stumble over: zero and constant channels, too few tokens."""
    dead_I = stats.absmax_I == 0
    return {
        "in_features": len(dead_I),
        "num_tokens": stats.num_tokens,
        "num_dead": int(dead_I.sum()),
        "num_constant": int(((stats.minimum_I == stats.maximum_I) & ~dead_I).sum()),
    }


def _about(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        about: dict[str, Any] = json.loads(opened.metadata()["about"])
    return about


def _check_digest(file: Path, digest: str) -> None:
    try:
        found = _digest(file)
    except OSError as error:
        raise _damaged(file, str(error.strerror)) from error
    if found != digest:
        raise _damaged(file, "its content is not what was written")


def _damaged(file: Path, fault: str) -> CalibrationError:
    return CalibrationError(
        f"a stored calibration must be whole: {file}: {' '.join(fault.split())}. Delete the folder; the next run makes "
        "it again."
    )


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _natural(name: str) -> list[Any]:
    """Sorts model.layers.10 after model.layers.9."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in name.split(".")]


@cache
def _code() -> str:
    """Hash of the sources that decide the numbers."""
    root = Path(__file__).resolve().parents[2]
    files = [file for package in _SOURCES for file in (root / package).rglob("*.py")]
    return fingerprint({file.relative_to(root).as_posix(): _digest(file) for file in files})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""A calibration's folder: a file for each decoder layer, read when it is needed.

    index.json                   what made it, and the SHA-256 of every file
    ids.safetensors              the tokens
    model.layers.3.safetensors   statistics of one layer, see `layer_file`

A folder gets its name when it is complete. Until then it is a `Partial`, whose finished layers are there already.

Letters: N sequences, T tokens.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quantlab.calibration.layer_file import LayerFile, about_layer, write_layer
from quantlab.calibration.statistics import BlockStats, Calibration
from quantlab.calibration.whole_files import check_digest, damaged, digest_of, write_tensors
from quantlab.errors import CalibrationError
from quantlab.export.atomic import fsync

__all__ = ["FORMAT_VERSION", "Partial", "linear_facts", "open_calibration"]

FORMAT_VERSION = 1
"""Of the files; one more with every change of what they hold or mean."""


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
            check_digest(path / "ids.safetensors", index["ids"])
            ids_NT = load_file(path / "ids.safetensors")["ids_NT"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise damaged(path / "index.json", f"{type(error).__name__}: {error}") from error
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
    files = {name: LayerFile(path / f"{name}.safetensors", entry["sha256"]) for name, entry in layers.items()}
    linears = {each: files[name] for name, entry in layers.items() for each in entry["linears"]}
    attention = {each: files[name] for name, entry in layers.items() for each in entry["attention"]}
    return Calibration(
        ids_NT, _Lazy(linears, LayerFile.linear), _Lazy(attention, LayerFile.attention), path.name
    )


def linear_facts(path: Path) -> dict[str, dict[str, Any]]:
    """in_features, num_tokens, num_dead and num_constant of every linear, read from the index alone."""
    layers = json.loads((path / "index.json").read_text(encoding="utf-8"))["layers"]
    return {name: facts for entry in layers.values() for name, facts in entry["linears"].items()}


class Partial:
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
        write_layer(self.path, block)

    def finish(self, ids_NT: Tensor, destination: Path) -> None:
        """Give the complete folder its name."""
        layers = {}
        for file in sorted(self.path.glob("*.safetensors"), key=lambda file: _natural(file.stem)):
            if file.stem != "ids":
                about = about_layer(file)
                layers[file.stem] = {"sha256": digest_of(file), **about}
        write_tensors(self.path / "ids.safetensors", {"ids_NT": ids_NT.long().cpu().contiguous()})
        index = {"made_by": self.made_by, "ids": digest_of(self.path / "ids.safetensors"), "layers": layers}
        (self.path / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        fsync(self.path / "index.json")
        self.path.rename(destination)
        fsync(destination.parent)


class _Lazy(Mapping[str, Any]):
    """Statistics by name, read from their layer's file at each look."""

    def __init__(self, files: Mapping[str, LayerFile], read: Callable[[LayerFile, str], Any]) -> None:
        self._files, self._read = files, read

    def __getitem__(self, name: str) -> Any:
        return self._read(self._files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files


def _natural(name: str) -> list[Any]:
    """Sorts model.layers.10 after model.layers.9."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in name.split(".")]

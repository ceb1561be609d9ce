"""A calibration's folder: a file for each decoder layer, read when it is needed.

    index.json                   what made it, and the SHA-256 of every file
    ids.safetensors              the tokens
    model.layers.3.safetensors   statistics of one layer, see `layer_file`

A folder gets its name when it is complete; `partial` is what it is until then.

Letters: N sequences, T tokens.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quantlab.calibration.layer_file import LayerFile
from quantlab.calibration.statistics import Calibration
from quantlab.calibration.whole_files import check_digest, damaged
from quantlab.errors import CalibrationError

__all__ = ["FORMAT_VERSION", "linear_facts", "open_calibration"]

FORMAT_VERSION = 1
"""Of the files; one more with every change of what they hold or mean."""


def open_calibration(path: Path, made_by: Mapping[str, Any] | None = None) -> Calibration:
    """The calibration in a folder; its layers are read, and checked against their digests, when they are asked for.

    Args:
        made_by: what it must have been made by, where that is known.

    Raises:
        CalibrationError: damaged, of another format version, or made by something else.
    """
    index, ids_NT = _read_index(path)
    found, layers = index["made_by"], index["layers"]
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


def _read_index(path: Path) -> tuple[dict[str, Any], Tensor]:
    """The index and the tokens of a folder of this format version."""
    try:
        index: dict[str, Any] = json.loads((path / "index.json").read_text(encoding="utf-8"))
        format_version, _ = index["made_by"]["format_version"], index["layers"]
        if format_version == FORMAT_VERSION:
            check_digest(path / "ids.safetensors", index["ids"])
            return index, load_file(path / "ids.safetensors")["ids_NT"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise damaged(path / "index.json", f"{type(error).__name__}: {error}") from error
    raise CalibrationError(
        f"a stored calibration must be of format version {FORMAT_VERSION}: {path} is of version {format_version}. "
        "Delete the folder; the next run makes it again."
    )


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

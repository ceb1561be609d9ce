"""A calibration that is not complete: the layers that were summed so far, each known by the digest of its content.

    .KEY.partial/index.json                   the SHA-256 of every layer, written anew with each
    .KEY.partial/model.layers.3.safetensors   see `layer_file`

A layer counts as there when its file is what was written; any other one is summed anew. `finish` gives the folder the
files that `stored` reads, and its name.

Letters: N sequences, T tokens.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

from torch import Tensor

from quantlab.calibration.layer_file import about_layer, write_layer
from quantlab.calibration.statistics import BlockStats
from quantlab.calibration.whole_files import digest_of, write_json, write_tensors
from quantlab.export.atomic import fsync

__all__ = ["Partial"]


class Partial:
    """The layers of a calibration that is not complete."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.made_by = path, made_by
        for leftover in path.glob("*.tmp"):
            leftover.unlink()
        self._layers = _digests(path / "index.json")

    def has(self, layer: str) -> bool:
        """Whether a layer is there, and is what was written."""
        try:
            return layer in self._layers and digest_of(self._file(layer)) == self._layers[layer]
        except OSError:
            return False

    def put(self, block: BlockStats) -> None:
        """Store one layer."""
        write_layer(self.path, block)
        self._layers[block.name] = digest_of(self._file(block.name))
        layers = {name: {"sha256": digest} for name, digest in self._layers.items()}
        write_json(self.path / "index.json", {"made_by": self.made_by, "layers": layers})

    def finish(self, ids_NT: Tensor, destination: Path) -> None:
        """Give the complete folder its name."""
        layers = {
            name: {"sha256": self._layers[name], **about_layer(self._file(name))}
            for name in sorted(self._layers, key=_natural)
        }
        write_tensors(self.path / "ids.safetensors", {"ids_NT": ids_NT.long().cpu().contiguous()})
        ids = digest_of(self.path / "ids.safetensors")
        write_json(self.path / "index.json", {"made_by": self.made_by, "ids": ids, "layers": layers})
        self.path.rename(destination)
        fsync(destination.parent)

    def discard(self) -> None:
        """Remove what is there: it is not of what its name says."""
        rmtree(self.path, ignore_errors=True)

    def _file(self, layer: str) -> Path:
        return self.path / f"{layer}.safetensors"


def _digests(index: Path) -> dict[str, str]:
    """Layer -> SHA-256 of its file; empty where that is not known."""
    try:
        layers = json.loads(index.read_text(encoding="utf-8"))["layers"]
        return {name: entry["sha256"] for name, entry in layers.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _natural(name: str) -> list[Any]:
    """Sorts model.layers.10 after model.layers.9."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in name.split(".")]

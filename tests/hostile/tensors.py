"""Safetensors files as dictionaries of numpy arrays, to change one tensor of a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.hostile.case import WEIGHTS, Damage

Arrays = dict[str, Any]


def reweighted(change: Callable[[Arrays], object], name: str = WEIGHTS) -> Damage:
    """Change the tensors of a weight file."""

    def damage(it: Path) -> None:
        arrays = load_file(it / name)
        change(arrays)
        (it / name).unlink()
        save_file(
            {key: np.ascontiguousarray(value) for key, value in arrays.items()}, it / name, {"format": "pt"}
        )

    return damage


def poked(ending: str, value: float, position: int = 7) -> Damage:
    """Put one value into the first tensor whose name ends so."""

    def change(arrays: Arrays) -> None:
        key = min(key for key in arrays if key.endswith(ending))
        arrays[key] = arrays[key].copy()
        arrays[key].reshape(-1)[position] = value

    return reweighted(change)


def replaced(ending: str, change: Callable[[Any], Any]) -> Damage:
    """Put another tensor in the place of the first whose name ends so; None removes it."""

    def change_one(arrays: Arrays) -> None:
        key = min(key for key in arrays if key.endswith(ending))
        value = change(arrays.pop(key))
        if value is not None:
            arrays[key] = value

    return reweighted(change_one)


def added(name: str, value: Any) -> Damage:
    """One tensor more."""
    return reweighted(lambda arrays: arrays.update({name: value}))

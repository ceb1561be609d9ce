"""Canonical form: a value as plain JSON data, and its hash, which is the same wherever the value is.

JSON has no NaN and no infinity. What is hashed may hold none; a result keeps null in their places.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["fingerprint", "plain", "sha256", "without_nonfinite"]


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, as 64 hexadecimal digits.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode())


def plain(value: Any) -> Any:
    """A value as JSON knows it: mappings with text keys, lists, text, numbers, booleans, null.

    Tuples and arrays become lists, numpy's scalars Python's, paths text, integer keys text.
    """
    if isinstance(value, Mapping):
        mapping = {str(key): plain(item) for key, item in value.items()}
        assert len(mapping) == len(value), f"two keys with one text: {sorted(map(str, value))}"
        return mapping
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    assert value is None or isinstance(value, str | int | float), f"not plain data: {type(value).__name__}"
    return value


def without_nonfinite(value: Any, place: str, found: dict[str, str]) -> Any:
    """A copy of plain data with null for each number that is not finite; `found` gets its dotted place and text."""
    if isinstance(value, dict):
        return {key: without_nonfinite(item, f"{place}.{key}", found) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nonfinite(item, f"{place}.{i}", found) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found[place.removeprefix(".")] = str(value)
        return None
    return value


def sha256(content: bytes) -> str:
    """Hash of bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()

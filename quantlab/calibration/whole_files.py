"""Files that are whole: a file gets its name when it is written, and is known by the digest of its content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quantlab.errors import CalibrationError, OutputError
from quantlab.export.atomic import fsync

__all__ = ["check_digest", "damaged", "digest_of", "write_json", "write_tensors"]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; what a killed writer leaves ends in .tmp.

    Raises:
        OSError, OutputError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata=dict(metadata or {}))
    except SafetensorError as error:
        raise OutputError(f"calibration must be writable: {temporary}: {error}.") from error
    temporary.chmod(0o644)  # the library makes files that only their owner may read
    fsync(temporary)
    temporary.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file; what a killed writer leaves ends in .tmp."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fsync(temporary)
    temporary.replace(path)


def digest_of(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_digest(file: Path, digest: str) -> None:
    """Refuse a file that is gone, or whose content is not what was written.

    Raises:
        CalibrationError: it is damaged.
    """
    try:
        found = digest_of(file)
    except OSError as error:
        raise damaged(file, str(error.strerror)) from error
    if found != digest:
        raise damaged(file, "its content is not what was written")


def damaged(file: Path, fault: str) -> CalibrationError:
    """The complaint about a file."""
    return CalibrationError(
        f"a stored calibration must be whole: {file}: {' '.join(fault.split())}. Delete the folder; the next run makes "
        "it again."
    )

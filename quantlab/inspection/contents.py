"""What the files of a checkpoint hold, and whether that is so still. No torch.

A key is made of a checkpoint's content before anything is computed, and its files are read later, perhaps by another
process. So what the key was made of goes along, and is compared where the files are read: first each file's identity
(device, inode, size, times of its last write and of its last change of any kind, in ns), which costs one `stat`; where
that differs, its SHA-256. A touched or copied file passes so, and one whose bytes changed does not, whatever its times.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from quantlab.errors import CheckpointError

__all__ = ["Contents", "FileContent", "Identity", "identities", "is_content"]

_HASHED = re.compile(
    r"(config|generation_config|chat_template|.*token.*|vocab|.*index)\.json|.*\.(model|txt|jinja|py)"
)

Identity = tuple[int, ...]

_KNOWN: dict[tuple[Path, Identity], str] = {}
"""Digests of this process, so that a file that was not touched is read once."""


@dataclass(frozen=True)
class FileContent:
    """A file as it was read."""

    path: Path
    identity: Identity
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read a file, unless this process has.

        Raises:
            CheckpointError: it is not there, cannot be read, or is written meanwhile.
        """
        identity = _identity(path)
        if (path, identity) not in _KNOWN:
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise CheckpointError(f"file must be readable: {path}: {error.strerror}.") from error
            if _identity(path) != identity:
                raise _changed(path, "was written while it was read")
            _KNOWN[path, identity] = digest
        return cls(path, identity, _KNOWN[path, identity])

    def is_same(self) -> bool:
        """Whether the file holds the same bytes."""
        return _identity(self.path) == self.identity or self.of(self.path).sha256 == self.sha256


@dataclass(frozen=True)
class Contents:
    """All files of a checkpoint that decide a score: weights, config, tokenizer, code."""

    path: Path
    """Folder or `.gguf` file."""
    weights: tuple[Path, ...]
    files: tuple[FileContent, ...]

    @classmethod
    def of(cls, path: Path, weights: tuple[Path, ...]) -> Self:
        """Read the files.

        Raises:
            CheckpointError: one of them cannot be read.
        """
        return cls(path, weights, tuple(map(FileContent.of, _paths(path, weights))))

    @property
    def sha256(self) -> str:
        """Of names and contents, never of places or times; a GGUF file's own name is not in it."""
        total = hashlib.sha256()
        for file in self.files:
            name = "model.gguf" if file.path == self.path else file.path.name
            total.update(f"{name} {file.sha256}\n".encode())
        return total.hexdigest()

    def check_loaded(self, loaded: Mapping[Path, Identity]) -> None:
        """Refuse to take these contents for what was loaded from files of other identities.

        Raises:
            CheckpointError: a file was written between loading and reading.
        """
        for file in self.files:
            if loaded.get(file.path) != file.identity:
                raise _changed(file.path, "was written after it was loaded")

    def check(self) -> None:
        """Refuse to go on with files that are no longer what they were.

        Raises:
            CheckpointError: one is gone, new, or has other bytes.
        """
        were = {file.path: file for file in self.files}
        are = _paths(self.path, self.weights)
        for path in sorted(were.keys() ^ set(are)):
            raise _changed(path, "is gone" if path in were else "is new")
        for file in self.files:
            if not file.is_same():
                raise _changed(file.path, "has other bytes than when the run began")


def is_content(name: str) -> bool:
    """Whether a file of a folder decides a score, going by its name."""
    return name.endswith(".safetensors") or _HASHED.fullmatch(name) is not None


def identities(path: Path, weights: tuple[Path, ...]) -> dict[Path, Identity]:
    """Identity of every file that decides a score, read or not."""
    return {file: _identity(file) for file in _paths(path, weights)}


def _paths(path: Path, weights: tuple[Path, ...]) -> list[Path]:
    """Files that decide a score, by name."""
    if not path.is_dir():
        return [path]
    others = [file for file in path.iterdir() if _HASHED.fullmatch(file.name)]
    return sorted({*weights, *others}, key=lambda file: file.name)


def _identity(path: Path) -> Identity:
    try:
        status = path.stat()
    except OSError as error:
        raise _changed(path, f"cannot be read ({error.strerror})") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _changed(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"a checkpoint must stay as it is while it is worked on: {path} {what}. Nothing was recorded of it since; run "
        "again once nothing writes there."
    )

"""A folder that appears whole or not at all. Needs no torch.

Files go into a hidden folder beside the destination; it gets its MANIFEST.json last, is flushed to disk and renamed.
An existing destination is replaced only when that is allowed and it is such a folder itself, and only after the new
one is complete: it is moved aside, the new one takes its name, then it is deleted.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from quantlab.errors import OutputError
from quantlab.manifest import MANIFEST, write_manifest

__all__ = ["check_destination", "check_place", "new_folder"]


def check_destination(destination: Path, *, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Refuse a destination that cannot or must not be written, before any work is done.

    Args:
        sources: files and folders of the checkpoint that is exported.

    Raises:
        OutputError: it exists and overwrite is off, holds anything but an earlier export, is no folder, overlaps a
            source, holds the working or home folder, or cannot be written.
    """
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise OutputError(f"output must be a new folder: {destination} is a file or a link. Choose another.")
    here = destination.resolve()
    for source in sources:
        there = source.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise OutputError(
                f"output folder must lie apart from the checkpoint: {destination} and {source} overlap. Choose another."
            )
    if destination.exists() and not overwrite:
        raise OutputError(f"output folder exists: {destination}. Choose another, or pass --overwrite.")
    if any(kept == here or here in kept.parents for kept in (Path.cwd(), Path.home().resolve())):
        raise OutputError(f"output folder must not hold the working or home folder: {destination}.")
    if destination.exists() and not _is_replaceable(destination):
        raise OutputError(
            f"--overwrite replaces an earlier export only: {destination} holds files and no {MANIFEST} of ours. "
            "Choose another, or empty it yourself."
        )
    check_place(here)


def check_place(destination: Path) -> None:
    """Refuse a folder that could not be made, without making it.

    A folder is made in the nearest one that exists and removed: permissions alone do not tell (/proc grants them).

    Raises:
        OutputError: names the folder that cannot be written.
    """
    folder = next(path for path in destination.absolute().parents if path.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".probe-", dir=folder)).rmdir()
    except OSError as error:
        raise OutputError(
            f"output folder must be writable: {folder} is not ({error.strerror}). Choose another place."
        ) from error


@contextmanager
def new_folder(
    destination: Path, *, overwrite: bool = False, facts: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """A temporary folder to fill; it takes the destination's name when the block ends well, else it is removed.

    `facts` go into the manifest, as they are when the block ends.

    Raises:
        OutputError: as `check_destination`, or writing failed (disk full, read-only); the destination is then
            what it was.
    """
    check_destination(destination, overwrite=overwrite)
    temporary: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(destination, "partial")
        yield temporary
        write_manifest(temporary, facts)
        _flush(temporary)
        _move(temporary, destination, overwrite=overwrite)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise OutputError(f"output folder could not be written: {destination}: {reason}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _is_replaceable(folder: Path) -> bool:
    """Whether the folder is empty or was made by `new_folder`."""
    try:
        if not any(folder.iterdir()):
            return True
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format_version", "quantlab", "files"} <= manifest.keys()


def _beside(destination: Path, what: str) -> Path:
    """A new hidden folder in the destination's parent."""
    return Path(tempfile.mkdtemp(prefix=f".{destination.name}.{what}-", dir=destination.parent))


def _flush(folder: Path) -> None:
    """Ordinary permissions (temporary files are private) and fsync, so that a rename never outlives what it names."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        fsync(path)


def fsync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(temporary: Path, destination: Path, *, overwrite: bool) -> None:
    """Give the complete folder its name; what had it before is deleted after that."""
    # Without overwrite a folder that came into being meanwhile makes the rename fail, unless it is empty.
    if not overwrite or not destination.exists():
        temporary.rename(destination)
        fsync(destination.parent)
        return
    former = _beside(destination, "former")
    destination.rename(former)
    try:
        temporary.rename(destination)
    except BaseException:
        former.rename(destination)
        raise
    fsync(destination.parent)
    shutil.rmtree(former, ignore_errors=True)

"""Writing a file whole or not at all, and telling beforehand whether a folder takes one."""

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

from quantlab.errors import OutputError

__all__ = ["PROBE_BYTES", "check_writable", "write_atomic"]

PROBE_BYTES = 2**20
"""Room that must be free before a run starts."""


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`: readers see the old file or the new one, whatever happens.

    A temporary file beside it is written, synced and renamed, and the folder is synced. Folders are made as needed.

    Raises:
        OutputError: no space, read-only, no permission, or any other reason, with the path. No part file stays.
    """
    try:
        _replace(path, data)
    except OSError as error:
        raise _unwritable(path, len(data), error) from error


def check_writable(folder: Path) -> None:
    """Write, sync and remove a file of `PROBE_BYTES` in a folder, so that a run fails before it computes.

    Raises:
        OutputError: the folder cannot be made or written, or its disk is full.
    """
    probe = folder / f".probe-{secrets.token_hex(8)}"
    try:
        _replace(probe, bytes(PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        raise _unwritable(folder, PROBE_BYTES, error) from error


def _replace(path: Path, data: bytes) -> None:
    """The steps of `write_atomic`, with the system's own error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _unwritable(path: Path, num_bytes: int, error: OSError) -> OutputError:
    reason = error.strerror or type(error).__name__
    return OutputError(
        f"results must be writable: {path} ({num_bytes} bytes): {reason}. "
        "Free space or permissions there, or give another --out."
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable, where its file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)

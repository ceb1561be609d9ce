"""Locks: one process at a time does what a file's name stands for; the others wait.

A lock is the operating system's (flock), so it ends with its process, however that dies: there is no stale lock to
judge by pid or clock. Where the file system has no such locks, nobody waits.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantlab.errors import OutputError

__all__ = ["locked", "make_folder"]

_LOG = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of this file, which exists for the span of the block; yields False where there are no locks.

    Raises:
        OutputError: its folder cannot be written.
    """
    descriptor, held = _lock(path)
    try:
        yield held
    finally:
        if held:
            with suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _lock(path: Path) -> tuple[int, bool]:
    """An open descriptor of the claim's file, and whether it is locked (False: no locks on this file system)."""
    make_folder(path.parent)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"results must be writable: {path}: {error.strerror}.") from error
        try:
            if not _wait_for(descriptor, path):
                return descriptor, False
            # The holder before us removed the file: a lock on a file without a name excludes nobody.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, True
        except FileNotFoundError:
            pass  # removed between the two looks at it
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path) -> bool:
    """Lock the file, waiting for another process if need be; False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _LOG.info("another process works on this, waiting for it: %s", path.name)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"results must be writable: {folder}: {error.strerror}.") from error

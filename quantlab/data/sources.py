"""Files in: bytes of a user's file or of one that ships with the package; every failure names the file."""

import io
import lzma
import stat
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from quantlab.errors import DataError

MAX_BYTES = 1 << 30
"""Of a user's text or rows, unpacked."""


def shipped(name: str) -> bytes:
    """The decompressed bytes of a file in `quantlab/data/files`."""
    return lzma.decompress((files("quantlab") / "data" / "files" / name).read_bytes())


def read_bytes(path: Path) -> bytes:
    """The bytes of a user's file, decompressed when its name ends in `.xz`.

    Raises:
        DataError: not a regular file, unreadable, or larger than MAX_BYTES, packed or unpacked.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"file must be readable: {path} is a folder, pipe or device.")
        if status.st_size > MAX_BYTES:
            raise DataError(f"file must hold at most {MAX_BYTES} bytes: {path} holds {status.st_size}.")
        content = path.read_bytes()
        return _unpacked(content, path) if path.suffix == ".xz" else content
    except FileNotFoundError as error:
        raise DataError(f"file must exist: {path} does not. Check the path.") from error
    except (OSError, ValueError, lzma.LZMAError) as error:
        raise DataError(f"file must be readable: {path}: {error}.") from error


def _unpacked(content: bytes, path: Path) -> bytes:
    """Decompressed no further than MAX_BYTES, which a few bytes can be made to exceed."""
    with lzma.open(io.BytesIO(content)) as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise DataError(f"file must hold at most {MAX_BYTES} bytes: {path} unpacks to more.")
    return text


def decode(content: bytes, source: str) -> str:
    """The bytes as UTF-8 text."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text must be UTF-8: {source} has byte 0x{content[error.start]:02x} at offset {error.start}. "
            "Convert the file to UTF-8."
        ) from error


def seeded_order(count: int, seed: int) -> list[int]:
    """A permutation of range(count) that only `seed` decides: positions sorted by the SHA-256 of "seed:position".

    It is the same for every version of every library, which the permutations of numpy do not promise.
    """
    return sorted(range(count), key=lambda position: sha256(f"{seed}:{position}".encode()).digest())


def digest(content: bytes) -> str:
    """SHA-256 of the content, in hexadecimal."""
    return sha256(content).hexdigest()

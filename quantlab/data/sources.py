"""Files in: bytes of a user's file or of one that ships with the package; every failure names the file."""

import lzma
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from quantlab.errors import DataError


def shipped(name: str) -> bytes:
    """The decompressed bytes of a file in `quantlab/data/files`."""
    return lzma.decompress((files("quantlab") / "data" / "files" / name).read_bytes())


def read_bytes(path: Path) -> bytes:
    """The bytes of a user's file, decompressed when its name ends in `.xz`."""
    try:
        content = path.read_bytes()
        return lzma.decompress(content) if path.suffix == ".xz" else content
    except FileNotFoundError as error:
        raise DataError(f"file must exist: {path} does not. Check the path.") from error
    except (OSError, lzma.LZMAError) as error:
        raise DataError(f"file must be readable: {path}: {error}.") from error


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

"""Files in: bytes of a user's file or of one that ships with the package; every failure names the file."""

import codecs
import io
import lzma
import re
import stat
import unicodedata
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from quantlab.errors import DataError

_NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
"""Control characters but tab and newline (C1 among them, which a wrong encoding leaves), and the byte order mark."""

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""First bytes of a file -> the encoding that they announce; UTF-32's begin with UTF-16's."""
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
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            raise DataError(
                f"text must be UTF-8: {source} begins with the mark of {encoding}. Convert the file to UTF-8."
            )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text must be UTF-8: {source} has byte 0x{content[error.start]:02x} at offset {error.start}. "
            "Convert the file to UTF-8."
        ) from error


def plain_text(content: bytes, source: str) -> str:
    """The bytes as text, with universal newlines: CRLF and CR become LF, so that they change no score.

    Raises:
        DataError: not UTF-8, or it holds what is no text and would be tokenized all the same: a byte order mark or a
            control character other than tab and newline.
    """
    text = decode(content, source).replace("\r\n", "\n").replace("\r", "\n")
    if found := _NO_TEXT.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise DataError(
            f"text must hold no control characters: {source} has U+{ord(found[0]):04X} "
            f"({unicodedata.name(found[0], 'a control character').lower()}) in line {line}. Remove it, or convert "
            "the file from the encoding that it was written in."
        )
    return text


def seeded_order(count: int, seed: int) -> list[int]:
    """A permutation of range(count) that only `seed` decides: positions sorted by the SHA-256 of "seed:position".

    It is the same for every version of every library, which the permutations of numpy do not promise.
    """
    return sorted(range(count), key=lambda position: sha256(f"{seed}:{position}".encode()).digest())


def digest(content: bytes) -> str:
    """SHA-256 of the content, in hexadecimal."""
    return sha256(content).hexdigest()

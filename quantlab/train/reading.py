"""Text sources in, documents out: streamed, decompressed on the way, decoded as UTF-8.

No more than one document and one chunk of bytes are held at a time.
"""

import codecs
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import IO, Any

from quantlab.errors import ConfigError, DataError
from quantlab.train.config import SourceConfig

_CHUNK = 1 << 20
_WINDOW = 1 << 27
"""Window of `zstd --long=27`: frames that need more are refused."""


def documents(path: Path, source: SourceConfig) -> Iterator[str]:
    """The documents of a source in the order of the file, stripped; some may be empty.

    Raises:
        DataError: the file is missing, unreadable, damaged or not UTF-8.
        ConfigError: the file's compression is unknown, or its package is not installed.
    """
    between = {"separator": source.separator, "line": "\n", "file": None}[source.documents]
    rest = ""
    for text in _decoded(path):
        rest += text
        if between is not None and between in rest:
            *whole, rest = rest.split(between)
            yield from (document.strip() for document in whole)
    yield rest.strip()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as they lie on disk."""
    with _readable(path), path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _decoded(path: Path) -> Iterator[str]:
    """The file as pieces of text; a character is never cut."""
    # CRLF and CR become LF: the same text gives the same tokens.
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    offset = 0
    with _readable(path), _opened(path) as stream:
        while chunk := stream.read(_CHUNK):
            pending = len(decoder.getstate()[0])
            yield _decode(decoder, chunk, path, offset - pending)
            offset += len(chunk)
        _decode(decoder, b"", path, offset - len(decoder.getstate()[0]), final=True)


def _decode(decoder: Any, chunk: bytes, path: Path, offset: int, *, final: bool = False) -> str:
    try:
        text: str = decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        raise DataError(
            f"text must be UTF-8: {path} has byte 0x{error.object[error.start]:02x} at offset {offset + error.start}. "
            "Convert the file to UTF-8."
        ) from error
    return text


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        stream: IO[bytes] = _zstandard().open(
            path, dctx=_zstandard().ZstdDecompressor(max_window_size=_WINDOW)
        )
        return stream
    if path.suffix != ".txt":
        raise ConfigError(f"text file must end in .txt, .txt.xz or .txt.zst, found {path}.")
    return path.open("rb")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Failures of reading as one sentence that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"training text must exist: {path} does not. Set corpus.folder to the folder that holds it."
        ) from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"file must be readable: {path}: {error}.") from error
    except Exception as error:
        # zstandard's error is a plain Exception of a package that may be absent.
        if type(error).__module__.split(".")[0] != "zstandard":
            raise
        raise DataError(f"file must be readable: {path}: {error}.") from error


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(".zst files need the package of quantlab[train]: zstandard is missing.") from error
    return zstandard

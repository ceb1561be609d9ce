"""The code's version: a hash of the sources, so that a record of other code has another name."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

__all__ = ["source_hash", "tree_hash"]

_PACKAGES = ("probes", "quantlab")


@cache
def source_hash() -> str:
    """SHA-256 over names and contents of the Python sources of `probes` and `quantlab`: the code's version."""
    return tree_hash(Path(__file__).resolve().parents[2], _PACKAGES)


def tree_hash(root: Path, packages: Sequence[str]) -> str:
    """SHA-256 over names and contents of the Python sources of packages that lie at root."""
    digest = hashlib.sha256()
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()

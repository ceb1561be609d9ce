"""The code's version: a hash of the sources, so that a record of other code has another name.

What is kept for long (a calibration) has the hash of the sources that can run when it is made: those that its entry
module reaches through imports, wherever in a file they stand. It is derived, so that a module that comes to be used is
covered the day it is imported. A file that imports by name (`import_module`) reaches all that lies in its package.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

__all__ = ["ROOT", "reachable", "reachable_hash", "source_hash", "tree_hash"]

ROOT = Path(__file__).resolve().parents[2]
"""Where the packages lie."""
_PACKAGES = ("probes", "quantlab")


@cache
def source_hash() -> str:
    """SHA-256 over names and contents of the Python sources of `probes` and `quantlab`: the code's version."""
    return tree_hash(ROOT, _PACKAGES)


def tree_hash(root: Path, packages: Sequence[str]) -> str:
    """SHA-256 over names and contents of the Python sources of packages that lie at root."""
    return _files_hash(root, (path for package in packages for path in (root / package).rglob("*.py")))


@cache
def reachable_hash(*modules: str, root: Path = ROOT) -> str:
    """SHA-256 over names and contents of the sources that modules reach."""
    return _files_hash(root, reachable(modules, root))


def reachable(modules: Iterable[str], root: Path = ROOT) -> set[Path]:
    """Files of modules, of the packages around them, and of all that these import, directly or not."""
    found: set[Path] = set()
    waiting = list(modules)
    while waiting:
        for path in _files_of(waiting.pop(), root) - found:
            found.add(path)
            waiting += _imports(path, root)
    return found


def _files_of(module: str, root: Path) -> set[Path]:
    """The files that an import of `a.b.c` runs; of a name in a module, those of the module."""
    parts = module.split(".")
    places = (root.joinpath(*parts[:end]) for end in range(1, len(parts) + 1))
    candidates = (path for place in places for path in (place / "__init__.py", place.with_suffix(".py")))
    return {path for path in candidates if path.is_file()} if parts[0] in _PACKAGES else set()


def _imports(path: Path, root: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it; where it imports by name, all of its package."""
    package = path.parent.relative_to(root).parts
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            yield from names
            if "importlib.import_module" in names:
                neighbours = (each.relative_to(root).with_suffix("") for each in path.parent.rglob("*.py"))
                yield from (".".join(each.parts) for each in neighbours)


def _files_hash(root: Path, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()

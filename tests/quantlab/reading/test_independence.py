"""The reading side shares no code with the writing one, so that a mistake in one is not repeated in the other."""

import ast
from pathlib import Path

import quantlab.reading

WRITING = ("quantlab.export", "quantlab.methods", "torch", "transformers")


def _imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_decoders_import_nothing_of_the_writers() -> None:
    files = sorted(Path(quantlab.reading.__path__[0]).rglob("*.py"))
    assert len(files) > 10
    for path in files:
        wrong = {name for name in _imported(path) if f"{name}.".startswith(tuple(f"{w}." for w in WRITING))}
        assert not wrong, f"{path.name} imports {sorted(wrong)}"

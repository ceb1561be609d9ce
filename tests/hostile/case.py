"""A case: a good checkpoint, what a script does to it, and the sentence that must refuse it.

A case has a place of its own: `PLACE/it` is the copy of the good checkpoint, `PLACE/outside` lies beside it and must
never be opened, `PLACE/canary` is what a payload would create, `PLACE/work` takes what the command line writes.
"""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

Damage = Callable[[Path], Path | str | None]
"""Changes the good checkpoint in a folder; returns what is opened, where that is not the folder itself."""


@dataclass(frozen=True)
class Case:
    """One bad file."""

    name: str
    classes: str
    """Classes of bad input, `B4 B19`; the table is in corpus.py."""
    damage: Damage
    says: str
    """Matches the one line of the refusal; empty for a good control."""
    base: str = "llama"
    """The good checkpoint that is damaged, of bases.py."""
    loads: bool = False
    """Told only by loading: torch is needed."""
    verb: str = "profile"
    """Verb of the command line, of verbs.py."""
    tools: tuple[str, ...] = ("transformers",)
    """Other readers of the same file, for benchmarks/hostile_files.py."""

    @property
    def good(self) -> bool:
        """A control: it must be accepted."""
        return not self.says

    def make(self, bases: Path, place: Path) -> Path | str:
        """Build the case from the good checkpoints in `bases`; returns the path that is opened."""
        it = place / "it"
        shutil.copytree(bases / self.base, it, symlinks=True)
        for name in ("outside", "work"):
            (place / name).mkdir()
        path = self.damage(it)
        # A stranger's folder has no manifest of the good one: what a manifest finds is for verify and its own cases.
        if self.verb != "verify" and "B29" not in self.classes and not self.good:
            (it / "MANIFEST.json").unlink(missing_ok=True)
        return opened(it) if path is None else path


def opened(it: Path) -> Path:
    """The one GGUF file of a folder without a config, else the folder."""
    found = sorted(it.glob("*.gguf"))
    return found[0] if found and not (it / CONFIG).exists() else it


def canary(it: Path) -> Path:
    """What a payload in the folder would create."""
    return it.parent / "canary"


def written(name: str, content: bytes | str | Any) -> Damage:
    """Write a file: bytes, text, or an object as JSON."""

    def damage(it: Path) -> None:
        (it / name).parent.mkdir(parents=True, exist_ok=True)
        (it / name).unlink(missing_ok=True)
        if isinstance(content, bytes):
            (it / name).write_bytes(content)
        else:
            (it / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return damage


def changed(name: str, **changes: Any) -> Damage:
    """Change keys of a JSON file; None removes one."""

    def damage(it: Path) -> None:
        tree = json.loads((it / name).read_text()) if (it / name).exists() else {}
        kept = {key: value for key, value in (tree | changes).items() if value is not None}
        (it / name).write_text(json.dumps(kept))

    return damage


def configured(**changes: Any) -> Damage:
    """Change config.json; None removes a key."""
    return changed(CONFIG, **changes)


def sparse(name: str, size: int, start: bytes = b"") -> Damage:
    """A file of `size` bytes that takes no room on disk: `start`, then zeros."""

    def damage(it: Path) -> None:
        (it / name).unlink(missing_ok=True)
        with (it / name).open("wb") as file:
            file.write(start)
            file.truncate(size)

    return damage


def linked(name: str, target: str) -> Damage:
    """Put a link to a place (seen from the folder) where a file was."""

    def damage(it: Path) -> None:
        (it / name).unlink(missing_ok=True)
        (it / name).symlink_to(target)

    return damage


def moved_out(name: str) -> Damage:
    """Move a file out of the folder and leave a link to it."""

    def damage(it: Path) -> None:
        shutil.move(it / name, it.parent / "outside" / name)
        (it / name).symlink_to(Path("../outside") / name)

    return damage


def without(*names: str) -> Damage:
    """Remove files."""

    def damage(it: Path) -> None:
        for name in names:
            (it / name).unlink()

    return damage


def both(*damages: Damage) -> Damage:
    """One damage after another; the last path that is returned counts."""

    def damage(it: Path) -> Path | str | None:
        paths = [step(it) for step in damages]
        return next((path for path in reversed(paths) if path is not None), None)

    return damage


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def packed(header: bytes | Mapping[str, Any], data: bytes = bytes(4)) -> bytes:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def unpacked(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a good safetensors file."""
    blob = path.read_bytes()
    (length,) = struct.unpack_from("<Q", blob)
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def reheaded(change: Callable[[dict[str, Any]], Any], name: str = WEIGHTS) -> Damage:
    """Change the header of a safetensors file, or put what is returned in its place; the data stays."""

    def damage(it: Path) -> None:
        header, data = unpacked(it / name)
        replaced = change(header)
        (it / name).write_bytes(packed(header if replaced is None else replaced, data))

    return damage

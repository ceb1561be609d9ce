"""A certificate put into its folder, which is at every moment the old one or the new one, with a true MANIFEST.

The new folder is made beside the old one, of links to the same files where the disk has them, with a new card,
certificate and MANIFEST; then the two change names in one step.
"""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantlab.errors import OutputError, VerificationError
from quantlab.export.atomic import fsync
from quantlab.manifest import MANIFEST, read_manifest, write_manifest
from quantlab.verify.card import into_card
from quantlab.verify.certificate import CARD, CERTIFICATE, Certificate

__all__ = ["check_writable", "write_certificate"]

_CHANGED = (CARD, CERTIFICATE)
_OF_MANIFEST = ("format_version", "quantlab", "files", "seal")
_LARGEST_CARD = 16_000_000
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_writable(folder: Path) -> None:
    """Refuse a folder whose certificate could not be written, before any work is done.

    Raises:
        OutputError: its parent cannot be written, or it holds the working folder, which it would take away.
    """
    here = folder.resolve()
    if not os.access(here.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"a certificate needs a folder that can be replaced: {here.parent} cannot be written."
        )
    if Path.cwd().is_relative_to(here):
        raise OutputError(
            f"a certificate replaces its folder: leave {folder} first, and name it from outside."
        )


def write_certificate(folder: Path, certificate: Certificate, manifest: Mapping[str, Any]) -> None:
    """Put certificate.json and its table on the card into the folder, and list them in the MANIFEST.

    Args:
        manifest: the folder's, whose files were found true.

    Raises:
        VerificationError: a file was changed since.
        OutputError: the folder cannot be written; it is what it was.
    """
    folder = folder.resolve()
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.certified-", dir=folder.parent))
        _fill(temporary, folder, certificate)
        facts = {name: value for name, value in manifest.items() if name not in _OF_MANIFEST}
        write_manifest(temporary, facts)
        _check_rest(read_manifest(temporary)["files"], manifest["files"], folder)
        for name in (*_CHANGED, MANIFEST):
            fsync(temporary / name)
        shutil.copystat(folder, temporary)
        fsync(temporary)
        _exchange(temporary, folder)
        fsync(folder.parent)
    except OSError as error:
        raise OutputError(f"certificate could not be written: {folder}: {error.strerror}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _fill(new: Path, old: Path, certificate: Certificate) -> None:
    for path in sorted(old.rglob("*")):
        target = new / path.relative_to(old)
        if path.is_dir():
            target.mkdir()
        elif path not in {old / name for name in (*_CHANGED, MANIFEST)}:
            _link(path, target)
    text = _card(old / CARD)
    (new / CARD).write_text(into_card(text, certificate), encoding="utf-8")
    (new / CERTIFICATE).write_text(certificate.text(), encoding="utf-8")


def _card(path: Path) -> str:
    """The card that there is; files were found true before, so that it is a plain file."""
    if not path.exists():
        return ""
    if path.stat().st_size > _LARGEST_CARD:
        raise VerificationError(f"a card must be a text of at most {_LARGEST_CARD} bytes: {path} is larger.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise VerificationError(
            f"a card must be UTF-8 text: {path} is not, at byte {error.start}."
        ) from error


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # no hard links on this disk, or none to another owner's file
        shutil.copy2(path, target)


def _check_rest(new: Mapping[str, Any], old: Mapping[str, Any], folder: Path) -> None:
    """Everything but what is written here is as it was when it was checked."""
    for name in sorted(new.keys() | old.keys()):
        if name not in _CHANGED and new.get(name) != old.get(name):
            raise VerificationError(
                f"a folder must not change while it is verified: {folder / name} did. Verify again."
            )


def _exchange(new: Path, old: Path) -> None:
    """Let two folders change names, in one step where the system can, else in two."""
    library = ctypes.CDLL(None, use_errno=True)
    rename = getattr(library, "renameat2", None)
    if rename and rename(_AT_FDCWD, bytes(new), _AT_FDCWD, bytes(old), _RENAME_EXCHANGE) == 0:
        return
    aside = new.with_name(f"{new.name}.former")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    with suppress(OSError):
        shutil.rmtree(aside)

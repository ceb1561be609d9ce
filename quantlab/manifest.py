"""MANIFEST.json: every file of a folder with its SHA-256 and size, sealed so that it cannot change unseen itself. No torch.

    {"format_version": 2, "quantlab": "0.1.0", "files": {NAME: {"sha256": .., "bytes": ..}}, ..., "seal": ..}

`seal` is the SHA-256 of the same text without its line. A folder of low-bit weights also has `tensors`: of every linear
in low bits the digests of its codes and scales, as the quantizer chose them (`quantlab.reading.decoded`).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import quantlab
from quantlab.errors import CheckpointError
from quantlab.inspection.safetensors_header import MAX_HEADER_BYTES, read_json, regular_file

__all__ = ["FORMAT_VERSION", "MANIFEST", "check_files", "read_manifest", "write_manifest"]

MANIFEST = "MANIFEST.json"
FORMAT_VERSION = 2
"""Of the manifest. Version 1 had no seal and no tensors."""


def write_manifest(folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """List every file that is in the folder now; `facts` are further entries."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            files[path.relative_to(folder).as_posix()] = {
                "sha256": _sha256(path),
                "bytes": path.stat().st_size,
            }
    body = {
        "format_version": FORMAT_VERSION,
        "quantlab": quantlab.__version__,
        "files": files,
        **(facts or {}),
    }
    body["seal"] = _seal(body)
    (folder / MANIFEST).write_text(_text(body), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, once it is known to be what was written.

    Raises:
        CheckpointError: it is missing, of another version, damaged or changed.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(
            f"a folder to verify must be an export of quantlab: {folder} has no {MANIFEST}."
        )
    if path.is_symlink() or regular_file(path).st_size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"manifest must be a plain file of at most {MAX_HEADER_BYTES} bytes: {path} is not."
        )
    text = path.read_bytes()
    body = read_json(text, path)
    if body.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"manifest must be of version {FORMAT_VERSION}: {path} has {body.get('format_version')!r}. Export again."
        )
    unsealed = {name: value for name, value in body.items() if name != "seal"}
    if body.get("seal") != _seal(unsealed) or text != _text(body).encode():
        raise CheckpointError(f"manifest is not what was written: {path} was changed. Export again.")
    if not _is_listing(body.get("files")):
        raise CheckpointError(f"manifest must list files with sha256 and bytes: {path} does not.")
    return body


def check_files(folder: Path) -> dict[str, Any]:
    """The manifest, once every file is known to be as listed and no other is there.

    Raises:
        CheckpointError: names the first file that is missing, changed, a link, or not listed.
    """
    manifest = read_manifest(folder)
    listed = manifest["files"]
    for name, entry in listed.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or _leads_out(path, folder):
            raise CheckpointError(f"files of a manifest must lie in its folder: {folder} lists {name!r}.")
        if not path.exists():
            raise CheckpointError(f"folder lacks a file of its manifest: {path}. Export again.")
        if regular_file(path).st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"file is not what was written: {path} was changed. Export again.")
    for path in sorted(folder.rglob("*")):
        if (
            not path.is_dir()
            and path != folder / MANIFEST
            and path.relative_to(folder).as_posix() not in listed
        ):
            raise CheckpointError(f"folder holds a file that its manifest does not list: {path}. Remove it.")
    return manifest


def _leads_out(path: Path, folder: Path) -> bool:
    return path.is_symlink() or not path.resolve().is_relative_to(folder.resolve())


def _is_listing(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int
        for entry in files.values()
    )


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(body).encode()).hexdigest()


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=2) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""MANIFEST.json: every file of a folder with its SHA-256 and size, sealed so that it cannot change unseen. No torch.

    {"format_version": 2, "quantlab": "0.1.0", "files": {NAME: {"sha256": .., "bytes": ..}}, ..., "seal": ..}

`seal` is the SHA-256 of the same text without its line. A folder of low-bit weights also has `tensors`: of every linear
in low bits the digests of its codes and scales, as the quantizer chose them (`quantlab.reading.decoded`).

A seal shows that a manifest was changed, not who wrote it: what it says is bounded before it is believed, and no file
is opened by a name that the walk of the folder did not find.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import quantlab
from quantlab.errors import CheckpointError
from quantlab.inspection.contents import Contents, is_content
from quantlab.inspection.folder import check_depth
from quantlab.inspection.safetensors_header import MAX_HEADER_BYTES, read_json, regular_file

__all__ = ["FORMAT_VERSION", "MANIFEST", "check_contents", "check_files", "read_manifest", "write_manifest"]

MANIFEST = "MANIFEST.json"
FORMAT_VERSION = 2
"""Of the manifest. Version 1 had no seal and no tensors."""
MAX_FILES = 100_000
MAX_FOLDERS = 16
"""Within each other."""


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
    check_depth(body, path)
    if body.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"manifest must be of version {FORMAT_VERSION}: {path} has {str(body.get('format_version'))[:80]!r}. "
            "Export again."
        )
    if not _is_sealed(text):
        raise CheckpointError(f"manifest is not what was written: {path} was changed. Export again.")
    if not _is_listing(body.get("files")):
        raise CheckpointError(f"manifest must list files with sha256 and bytes: {path} does not.")
    if not _is_digests(body.get("tensors", {})):
        raise CheckpointError(f"manifest must hold digests of codes and scales: {path} does not.")
    return body


def check_files(folder: Path) -> dict[str, Any]:
    """The manifest, once every file is known to be as listed and no other is there.

    Raises:
        CheckpointError: names the first file that is missing, changed, a link, or not listed.
    """
    manifest = read_manifest(folder)
    listed, there = manifest["files"], _files_of(folder)
    for name in listed:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"files of a manifest must lie in its folder: {folder} lists {name!r}.")
        if name not in there:
            raise CheckpointError(f"folder lacks a file of its manifest: {folder / name}. Export again.")
    for name in sorted(there - listed.keys()):
        raise CheckpointError(
            f"folder holds a file that its manifest does not list: {folder / name}. Remove it."
        )
    # Sizes of all before the bytes of one.
    changed = [
        name for name, entry in listed.items() if regular_file(folder / name).st_size != entry["bytes"]
    ]
    for name in changed or listed:
        if changed or _sha256(folder / name) != listed[name]["sha256"]:
            raise CheckpointError(f"file is not what was written: {folder / name} was changed. Export again.")
    return manifest


def check_contents(contents: Contents) -> None:
    """Refuse a checkpoint whose files are not those that its manifest lists; of another tool's folder nothing is asked.

    Only files that decide a score are looked at: a card may be edited, and a distributor may add files of its own.

    Raises:
        CheckpointError: the manifest is damaged, or a file is missing, changed, or not listed.
    """
    folder = contents.path
    if not folder.is_dir() or not _is_ours(folder / MANIFEST):
        return
    listed, found = _listing(folder), {file.path.name: file for file in contents.files}
    for name in sorted(listed):
        if is_content(name) and name not in found:
            raise CheckpointError(f"folder lacks a file of its manifest: {folder / name}. Export again.")
    for name, file in found.items():
        if name not in listed:
            raise CheckpointError(
                f"folder holds a file that its manifest does not list: {folder / name}. Remove it."
            )
        if listed[name]["sha256"] != file.sha256:
            raise CheckpointError(f"file is not what was written: {folder / name} was changed. Export again.")


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a manifest of any version: folders of version 1, which had no seal, are still scored."""
    path = folder / MANIFEST
    body = read_json(path.read_bytes(), path)
    check_depth(body, path)
    if body.get("format_version") != 1:
        body = read_manifest(folder)
    files: dict[str, dict[str, Any]] = body.get("files", {})
    if not _is_listing(files):
        raise CheckpointError(f"manifest must list files with sha256 and bytes: {path} does not.")
    return files


def _is_ours(path: Path) -> bool:
    """Whether a manifest is quantlab's: other tools write files of this name too."""
    if not path.is_file() or path.stat().st_size > MAX_HEADER_BYTES:
        return False
    return b'"quantlab"' in path.read_bytes()


def _files_of(folder: Path) -> set[str]:
    """Names of all that lies below a folder, folders and the manifest aside; no link is followed.

    Raises:
        CheckpointError: a link, or more files or folders than a checkpoint has.
    """
    found: set[str] = set()
    folders = [folder]
    while folders:
        for entry in _entries(folders.pop()):
            place = Path(entry.path).relative_to(folder)
            if entry.is_symlink():
                raise CheckpointError(
                    f"files of a manifest must lie in its folder: {folder / place} is a link."
                )
            if entry.is_dir(follow_symlinks=False):
                folders.append(folder / place)
            else:
                found.add(place.as_posix())
            if len(place.parts) > MAX_FOLDERS or len(found) + len(folders) > MAX_FILES:
                raise CheckpointError(
                    f"folder must hold at most {MAX_FILES} files, {MAX_FOLDERS} folders deep: {folder} holds more."
                )
    return found - {MANIFEST}


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise CheckpointError(f"folder must be readable: {folder}: {error.strerror}.") from error


def _is_listing(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int
        for entry in files.values()
    )


def _is_digests(tensors: Any) -> bool:
    return isinstance(tensors, dict) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(part), str) for part in ("codes", "scales"))
        for entry in tensors.values()
    )


def _is_sealed(text: bytes) -> bool:
    """Whether a text ends with the line of its seal, to the byte."""
    body, line, _ = text.rpartition(b',\n  "seal": "')
    seal = hashlib.sha256(body + b"\n}\n").hexdigest().encode()
    return text == body + line + seal + b'"\n}\n'


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(body).encode()).hexdigest()


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=2) + "\n"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"file must be readable: {path}: {error.strerror}.") from error

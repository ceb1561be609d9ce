"""Files that a manifest lists, in folders of folders too, and what is no file of it."""

from pathlib import Path

import pytest

from quantlab.errors import CheckpointError
from quantlab.manifest import check_files, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files at three depths, and the manifest that lists them."""
    inner = tmp_path / "listed" / "a" / "b"
    inner.mkdir(parents=True)
    for place in (inner, inner.parent, inner.parent.parent):
        (place / "weights.bin").write_bytes(b"12345")
    write_manifest(tmp_path / "listed", {})
    return tmp_path / "listed"


def test_files_of_inner_folders_are_listed_and_checked(folder: Path) -> None:
    assert set(read_manifest(folder)["files"]) == {"weights.bin", "a/weights.bin", "a/b/weights.bin"}
    assert check_files(folder) == read_manifest(folder)
    (folder / "a/b/weights.bin").write_bytes(b"12346")
    with pytest.raises(CheckpointError, match=r"not what was written: .*/a/b/weights\.bin was changed"):
        check_files(folder)


def test_a_link_in_an_inner_folder_is_named_with_its_place(folder: Path) -> None:
    (folder / "a/b/link.bin").symlink_to(folder / "weights.bin")
    with pytest.raises(CheckpointError, match=r"must lie in its folder: .*/listed/a/b/link\.bin is a link"):
        check_files(folder)

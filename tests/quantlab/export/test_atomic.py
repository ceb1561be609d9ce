"""The folder appears whole or not at all, and nothing is replaced that is no earlier export."""

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from quantlab.errors import OutputError
from quantlab.export import atomic, shards
from quantlab.models.loading import Checkpoint
from tests.quantlab.export.exports import export, loaded
from tests.toys import save_checkpoint


@pytest.fixture(scope="module")
def toy(toy_folder: Path) -> Checkpoint:
    return loaded(toy_folder)


def test_files_have_ordinary_permissions(toy: Checkpoint, tmp_path: Path) -> None:
    export(toy, tmp_path / "out")
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {
        (tmp_path / "plain").stat().st_mode
    }


def earlier_export(folder: Path) -> None:
    """A folder that may be replaced, with one more file in it."""
    with atomic.new_folder(folder) as new:
        (new / "mine").write_text("mine")


def test_an_existing_folder_is_not_touched(toy: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(OutputError, match=r"output folder exists: .*--overwrite"):
        export(toy, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_overwrite_replaces_an_earlier_export_whole(toy: Checkpoint, tmp_path: Path) -> None:
    export(toy, tmp_path / "out", max_shard_size=10_000)
    export(toy, tmp_path / "out", overwrite=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208
    (tmp_path / "empty").mkdir()
    export(toy, tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty/MANIFEST.json").exists()


@pytest.mark.parametrize(
    "manifest", [None, "mine", "[]", '{"files": {"mine": {}}}'], ids=["none", "text", "list", "foreign"]
)
def test_overwrite_replaces_nothing_but_an_earlier_export(
    toy: Checkpoint, tmp_path: Path, manifest: str | None
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    if manifest is not None:
        (tmp_path / "out/MANIFEST.json").write_text(manifest)
    with pytest.raises(OutputError, match=r"--overwrite replaces an earlier export only: \S+out holds"):
        export(toy, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/mine").read_text() == "mine"


@pytest.mark.parametrize("place", [".", "sub/out", "..", "../in-link/sub"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_replaced(tmp_path: Path, place: str, overwrite: bool) -> None:
    """Also where it looks like an earlier export, and where the way to it goes through a link."""
    root = tmp_path / "root"
    source = save_checkpoint("llama", root / "in")
    (root / "in-link").symlink_to(source)
    for folder in (root, source):
        (folder / "MANIFEST.json").write_text('{"format_version": 1, "quantlab": "1", "files": {}}')
    checkpoint = loaded(source)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(OutputError):
        export(checkpoint, Path(os.path.normpath(source / place)), overwrite=overwrite)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_source_is_named_where_it_would_be_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "models/toy.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    (file.parent / "MANIFEST.json").write_text('{"format_version": 1, "quantlab": "1", "files": {}}')
    for out in (file.parent, tmp_path):
        with pytest.raises(OutputError, match=rf"must lie apart from the checkpoint: {out} and {file}"):
            atomic.check_destination(out, overwrite=True, sources=[file])
    atomic.check_destination(file.parent / "out", overwrite=True, sources=[file])
    with pytest.raises(OutputError, match="must lie apart from the checkpoint"):
        atomic.check_destination(file.parent / "out", overwrite=False, sources=[file.parent])


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_mid_write_leaves_what_was_there(
    toy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, fault: BaseException
) -> None:
    if exists:
        earlier_export(tmp_path / "out")
    real, calls = safetensors.torch.save_file, []

    def save_file(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise fault
        real(*arguments, **options)

    monkeypatch.setattr(shards, "save_file", save_file)
    expected = OutputError if isinstance(fault, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        export(toy, tmp_path / "out", overwrite=exists, max_shard_size=10_000)
    if expected is OutputError:
        assert "No space left on device" in str(caught.value)
    names = ["MANIFEST.json", "mine", "out"] if exists else []
    assert sorted(path.name for path in tmp_path.rglob("*")) == names


def test_a_failure_of_the_last_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    earlier_export(out)
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        atomic.new_folder(out, overwrite=True) as new,
    ):
        (new / "yours").write_text("yours")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["MANIFEST.json", "mine", "out"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="could not be written"), atomic.new_folder(out):
        out.mkdir()
        (out / "mine").write_text("mine")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "out"]


def test_places_that_must_not_be_replaced_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work/here")
    with pytest.raises(OutputError, match="working or home folder"):
        atomic.check_destination(tmp_path / "work", overwrite=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "work")
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="is a file or a link"):
            atomic.check_destination(tmp_path / name, overwrite=True)
    with pytest.raises(OutputError, match="must be writable"):
        atomic.check_destination(tmp_path / "file/out", overwrite=False)

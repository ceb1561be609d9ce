"""A file is written whole or not at all, and a folder that takes none is told beforehand."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.errors import OutputError
from quantlab.records import check_writable, write_atomic


def failing(number: int):
    def call(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch, number, step):
    path = tmp_path / "x.json"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(
            *{"fsync": (os, "fsync"), "replace": (Path, "replace"), "open": (Path, "open")}[step],
            failing(number),
        )
        with pytest.raises(OutputError, match=rf"x\.json \(3 bytes\): {os.strerror(number)}"):
            write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert path.read_bytes() == b"old"


def test_an_interrupted_write_leaves_no_part(tmp_path, monkeypatch):
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_computing(tmp_path):
    # A real limit of the kernel: no file of this process may grow beyond 1,000 bytes.
    program = (
        "import sys; from pathlib import Path; from quantlab.records import *;"
        "from quantlab.errors import OutputError\n"
        "folder = Path(sys.argv[1]); write_atomic(folder / 'small', b'x' * 1000)\n"
        "try: check_writable(folder)\n"
        "except OutputError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        env=os.environ | {"PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"results must be writable: {tmp_path} (1048576 bytes): File too large." in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "runs", Path("/proc/nothing/runs")):
        with pytest.raises(OutputError, match=f"results must be writable: {folder}"):
            check_writable(folder)


def test_a_writable_folder_stays_empty(tmp_path):
    check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []

"""A sweep on a real (toy) model that is killed ends in the bytes of one that was not; workers change none."""

import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCHEMES = "w8,w4,w4g32,w8a8,l8t"


def _command(toy: Path, out: Path, workers: int) -> list[str]:
    text = ["--set", "evaluation.perplexity={sequence_length: 32, num_sequences: 2}"]
    profile = ["--set", "profile.text={sequence_length: 32, num_sequences: 2}"]
    options = ["--schemes", SCHEMES, "--limit", "12", "--workers", str(workers), "--out", str(out), "--json"]
    return [sys.executable, "-m", "quantlab", "sweep", str(toy), *options, *text, *profile]


def _digests(out: Path) -> dict[str, str]:
    """Every file of records by name."""
    return {
        path.name: sha256(path.read_bytes()).hexdigest() for path in sorted((out / "records").glob("[!.]*"))
    }


@pytest.fixture(scope="module")
def uninterrupted(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("sweep") / "whole"
    subprocess.run(_command(toy_folder, out, 1), cwd=ROOT, check=True, capture_output=True)
    digests = _digests(out)
    assert len(digests) == 2 * 7  # JSON and Parquet of a profile, the baseline and five schemes
    return digests


def test_two_workers_write_the_same_bytes_as_one(
    toy_folder: Path, tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    subprocess.run(_command(toy_folder, tmp_path, 2), cwd=ROOT, check=True, capture_output=True)
    assert _digests(tmp_path) == uninterrupted


def test_a_killed_sweep_goes_on_to_the_same_bytes(
    toy_folder: Path, tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    command = _command(toy_folder, tmp_path, 2)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "records").glob("[!.]*.json")):
        assert process.poll() is None and time.monotonic() < deadline, "nothing was recorded"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {name: digest for name, digest in _digests(tmp_path).items() if name.endswith(".json")}
    assert kept and kept.items() <= uninterrupted.items()
    before = {name: (tmp_path / "records" / name).stat().st_mtime_ns for name in kept}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert _digests(tmp_path) == uninterrupted
    assert before == {name: (tmp_path / "records" / name).stat().st_mtime_ns for name in kept}, (
        "computed again"
    )

"""Of a half-finished calibration every layer that is whole is kept, and every other one is summed anew."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantlab.calibration.collect import calibrate
from quantlab.calibration.statistics import Calibration
from tests import toys
from tests.quantlab.calibration.toy_calibrations import ids, store

FIRST, SECOND = (f"model.layers.{index}.safetensors" for index in range(2))


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """What a run leaves that is killed when both layers are stored."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("quantlab.calibration.partial.Partial.finish", _killed)
        store(tmp_path)
    return next(tmp_path.glob(".*.partial"))


def _killed(*args: object) -> None:
    raise KeyboardInterrupt


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _header_alone(content: bytes) -> bytes:
    return content[:4]


def _empty(content: bytes) -> bytes:
    return b""


def _flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [_truncated, _header_alone, _empty, _flipped])
def test_a_damaged_layer_is_summed_anew_and_the_others_are_kept(
    partial: Path, damage: Callable[[bytes], bytes]
) -> None:
    _damage(partial / FIRST, damage)
    kept = (partial / SECOND).stat().st_mtime_ns
    stored = store(partial.parent)
    assert (partial.parent / stored.key / SECOND).stat().st_mtime_ns == kept
    _check_equal(stored, calibrate(toys.toy_model(), ids()))


@pytest.mark.parametrize("damage", [_truncated, _empty, lambda _: b"[]", lambda _: b'{"layers": {"a": 1}}'])
def test_without_a_record_of_what_was_stored_all_is_summed_anew(
    partial: Path, damage: Callable[[bytes], bytes]
) -> None:
    _damage(partial / "index.json", damage)
    _check_equal(store(partial.parent), calibrate(toys.toy_model(), ids()))


def test_a_layer_that_is_no_file_is_summed_anew(partial: Path) -> None:
    (partial / SECOND).unlink()
    _check_equal(store(partial.parent), calibrate(toys.toy_model(), ids()))


def test_a_run_that_is_killed_again_keeps_what_either_run_stored(partial: Path) -> None:
    _damage(partial / FIRST, _flipped)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("quantlab.calibration.partial.Partial.finish", _killed)
        store(partial.parent)
    written = [(partial / name).stat().st_mtime_ns for name in (FIRST, SECOND)]
    finished = partial.parent / store(partial.parent).key
    assert [(finished / name).stat().st_mtime_ns for name in (FIRST, SECOND)] == written


def test_the_folder_is_that_of_an_undisturbed_run(partial: Path, tmp_path: Path) -> None:
    _damage(partial / FIRST, _flipped)
    resumed = partial.parent / store(partial.parent).key
    contents = {file.name: file.read_bytes() for file in resumed.iterdir()}
    shutil.rmtree(resumed)
    undisturbed = tmp_path / store(tmp_path).key
    assert {file.name: file.read_bytes() for file in undisturbed.iterdir()} == contents


def _damage(file: Path, damage: Callable[[bytes], bytes]) -> None:
    file.write_bytes(damage(file.read_bytes()))


def _check_equal(found: Calibration, expected: Calibration) -> None:
    assert list(found.linears) == list(expected.linears)
    for name, stats in expected.linears.items():
        for value in ("gram_II", "minimum_I", "maximum_I", "mean_I"):
            assert torch.equal(getattr(found.linears[name], value), getattr(stats, value))
    for name, ranges in expected.attention.items():
        for which in ("query", "key", "value"):
            ours, theirs = getattr(found.attention[name], which), getattr(ranges, which)
            assert torch.equal(ours.minimum_HC, theirs.minimum_HC)
            assert torch.equal(ours.maximum_HC, theirs.maximum_HC)

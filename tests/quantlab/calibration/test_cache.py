"""Calibrations are made once, under the name of all that made them, and a killed run goes on."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from probes.attention import attention_sites
from quantlab.calibration import cache, stored
from quantlab.calibration.cache import calibrated
from quantlab.calibration.collect import calibrate
from quantlab.errors import OutputError
from quantlab.quantize import quantized
from quantlab.records.sources import ROOT, reachable
from quantlab.schemes import Scheme
from tests import toys
from tests.quantlab.calibration.toy_calibrations import ids, store


def test_it_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store(tmp_path)
    monkeypatch.setattr(cache, "collect_blocks", _never)
    second = store(tmp_path)
    assert first.key == second.key == next(path.name for path in tmp_path.iterdir() if path.name[0] != ".")
    assert len(second.linears) == 14 and "model.layers.0.mlp.up_proj" in second.linears


@pytest.mark.parametrize(
    "changes",
    [{"checkpoint": "other"}, {"transforms": "rotate"}, {"accumulate": torch.float64}, {"batch_size": 2}],
)
def test_what_makes_it_names_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert store(tmp_path).key != store(tmp_path, **changes).key


def test_other_tokens_dtype_and_version_make_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {store(tmp_path).key, store(tmp_path, model=toys.toy_model().bfloat16()).key}
    keys.add(calibrated(toys.toy_model(), ids(seed=2), folder=tmp_path, checkpoint="abc").key)
    monkeypatch.setattr(stored, "FORMAT_VERSION", 2)
    for name, value in (
        ("FORMAT_VERSION", 2),
        ("version", lambda name: "0.0"),
        ("reachable_hash", lambda *names: "other"),
    ):
        monkeypatch.setattr(cache, name, value)
        keys.add(store(tmp_path).key)
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("family", "changes", "scheme", "room"),
    [
        ("llama", {}, "w16", "quantlab/calibration"),
        ("quantlab", {"variant": "diff_v1"}, "w16", "quantlab/attention"),
        ("llama", {}, "w8a8", "quantlab/kernels"),  # as a folder of low bits is loaded
        ("llama", {}, "w4g16a8kv8", "quantlab/numerics"),
    ],
)
def test_the_code_covers_every_source_that_a_calibration_runs(
    family: str, changes: dict[str, Any], scheme: str, room: str
) -> None:
    model = toys.toy_model(family, **changes)
    with attention_sites(model), quantized(model, Scheme.parse(scheme)):
        # Whether every swapped linear is called is watched in the first forward, and in no later one.
        model(ids())
        ran = _files_run_by(lambda: calibrate(model, ids()))
    assert any(file.startswith(f"{room}/") for file in ran)
    covered = {path.relative_to(ROOT).as_posix() for path in reachable(cache.ENTRY)}
    assert ran <= covered


def test_the_code_covers_what_reads_a_checkpoint() -> None:
    """Loading runs before `calibrate`: rows of GGUF weights are permuted by inspection, other formats decoded."""
    covered = {path.relative_to(ROOT).as_posix() for path in reachable(cache.ENTRY)}
    assert covered >= {
        "quantlab/inspection/gguf_names.py",
        "quantlab/models/loading.py",
        "quantlab/models/gguf_weights.py",
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "quantlab" / "reading").rglob("*.py")),
    }


def test_threads_make_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = store(tmp_path).key
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert store(tmp_path).key != one


def _files_run_by(call: Callable[[], object]) -> set[str]:
    """The files of probes and quantlab of which a function was called meanwhile."""
    ran: set[str] = set()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: ran.add(frame.f_code.co_filename))
    try:
        call()
    finally:
        sys.setprofile(before)
    own = (ROOT / "probes", ROOT / "quantlab")
    return {
        Path(file).relative_to(ROOT).as_posix() for file in ran if any(map(Path(file).is_relative_to, own))
    }


def test_a_killed_run_keeps_its_finished_layers(tmp_path: Path) -> None:
    model, seen = toys.toy_model(), 0

    def dies(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, model, advance=dies)
    partial = next(tmp_path.glob(".*.partial"))
    assert {file.name for file in partial.iterdir()} == {"index.json", "model.layers.0.safetensors"}
    written = (partial / "model.layers.0.safetensors").stat().st_mtime_ns
    (partial / "model.layers.1.safetensors.tmp").write_bytes(b"half")
    stored, expected = store(tmp_path, model), calibrate(model, ids())
    assert (tmp_path / stored.key / "model.layers.0.safetensors").stat().st_mtime_ns == written
    assert sorted(file.name for file in (tmp_path / stored.key).iterdir()) == [
        "ids.safetensors",
        "index.json",
        "model.layers.0.safetensors",
        "model.layers.1.safetensors",
    ]
    for name, stats in expected.linears.items():
        assert torch.equal(stored.linears[name].gram_II, stats.gram_II)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="writable"):
        store(tmp_path / "file")


def _never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("computed again")

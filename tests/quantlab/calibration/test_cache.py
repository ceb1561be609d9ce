"""Stored calibrations: made once, whole, and of what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantlab.calibration.cache as cache
from quantlab.calibration.cache import calibrated, open_calibration
from quantlab.calibration.collect import calibrate
from quantlab.errors import CalibrationError, OutputError
from tests import toys


def _ids(num_sequences: int = 4, length: int = 12, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, toys.NUM_TOKENS, (num_sequences, length), generator=generator)


def _store(folder: Path, model: nn.Module | None = None, **changes: Any) -> Any:
    return calibrated(model or toys.toy_model(), _ids(), **{"folder": folder, "checkpoint": "abc"} | changes)


def test_what_is_read_is_what_was_computed(tmp_path: Path) -> None:
    stored, expected = _store(tmp_path), calibrate(toys.toy_model(), _ids())
    assert torch.equal(stored.ids_NT, expected.ids_NT)
    assert list(stored.linears) == list(expected.linears) and list(stored.attention) == list(
        expected.attention
    )
    for name, stats in expected.linears.items():
        for value in ("gram_II", "minimum_I", "maximum_I", "mean_I", "absmax_I"):
            assert torch.equal(getattr(stored.linears[name], value), getattr(stats, value))
        assert stored.linears[name].num_tokens == stats.num_tokens
    for name, ranges in expected.attention.items():
        for which in ("query", "key", "value"):
            found, wanted = getattr(stored.attention[name], which), getattr(ranges, which)
            assert torch.equal(found.minimum_HC, wanted.minimum_HC)
            assert torch.equal(found.maximum_HC, wanted.maximum_HC)


def test_it_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _store(tmp_path)
    monkeypatch.setattr(cache, "collect_blocks", _never)
    second = _store(tmp_path)
    assert first.key == second.key == next(path.name for path in tmp_path.iterdir() if path.name[0] != ".")
    assert len(second.linears) == 14 and "model.layers.0.mlp.up_proj" in second.linears


@pytest.mark.parametrize(
    "changes",
    [{"checkpoint": "other"}, {"transforms": "rotate"}, {"accumulate": torch.float64}],
)
def test_what_makes_it_names_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert _store(tmp_path).key != _store(tmp_path, **changes).key


def test_other_tokens_dtype_and_version_make_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {_store(tmp_path).key, _store(tmp_path, model=toys.toy_model().bfloat16()).key}
    keys.add(calibrated(toys.toy_model(), _ids(seed=2), folder=tmp_path, checkpoint="abc").key)
    for name, value in (("FORMAT_VERSION", 2), ("version", lambda name: "0.0"), ("_code", lambda: "other")):
        monkeypatch.setattr(cache, name, value)
        keys.add(_store(tmp_path).key)
    assert len(keys) == 6


def test_the_code_is_all_that_decides_the_numbers() -> None:
    """Every package whose modules a calibration runs, once each."""
    root = Path(cache.__file__).parents[2]
    assert all(list((root / package).glob("*.py")) for package in cache._SOURCES)
    used = ("quantlab/layers/targets.py", "quantlab/calibration/stream.py", "probes/attention.py")
    assert all(file.startswith(cache._SOURCES) and (root / file).exists() for file in used)
    assert cache._code() == cache._code() and len(cache._code()) == 64


def test_linears_that_share_an_input_share_one_gram_on_disk_and_in_memory(tmp_path: Path) -> None:
    stored = _store(tmp_path)
    q, k = (stored.linears[f"model.layers.0.self_attn.{each}_proj"] for each in "qk")
    assert q.gram_II is k.gram_II
    down = stored.linears["model.layers.0.mlp.down_proj"].gram_II
    sizes = [path.stat().st_size for path in (tmp_path / stored.key).glob("model.*")]
    grams = 3 * q.gram_II.numel() + down.numel()
    assert len(sizes) == 2 and all(size < 4 * grams * 1.5 for size in sizes)


def test_a_killed_run_keeps_its_finished_layers(tmp_path: Path) -> None:
    model, seen = toys.toy_model(), 0

    def dies(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _store(tmp_path, model, advance=dies)
    partial = next(tmp_path.glob(".*.partial"))
    assert [file.name for file in partial.iterdir()] == ["model.layers.0.safetensors"]
    written = (partial / "model.layers.0.safetensors").stat().st_mtime_ns
    (partial / "model.layers.1.safetensors.tmp").write_bytes(b"half")
    stored, expected = _store(tmp_path, model), calibrate(model, _ids())
    assert (tmp_path / stored.key / "model.layers.0.safetensors").stat().st_mtime_ns == written
    assert sorted(file.name for file in (tmp_path / stored.key).iterdir()) == [
        "ids.safetensors",
        "index.json",
        "model.layers.0.safetensors",
        "model.layers.1.safetensors",
    ]
    for name, stats in expected.linears.items():
        assert torch.equal(stored.linears[name].gram_II, stats.gram_II)


def test_a_linear_that_no_token_reaches_is_stored_without_its_gram(tmp_path: Path) -> None:
    model = toys.toy_model()
    model.model.layers[1].mlp.spare = nn.Linear(7, 3)
    stats = _store(tmp_path, model).linears["model.layers.1.mlp.spare"]
    assert stats.num_tokens == 0 and stats.gram_II.shape == (7, 7)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / _store(tmp_path).key
    _edit(path, format_version=0)
    with pytest.raises(
        CalibrationError, match=r"must be of format version 1: .* is of version 0\. Delete the folder"
    ):
        _store(tmp_path)


def test_another_checkpoints_calibration_is_refused(tmp_path: Path) -> None:
    """A folder that was given the name of another."""
    path = tmp_path / _store(tmp_path).key
    _edit(path, checkpoint="xyz")
    with pytest.raises(CalibrationError, match=r"was made by checkpoint 'xyz', asked for is 'abc'\. Delete"):
        _store(tmp_path)


@pytest.mark.parametrize("file", ["model.layers.1.safetensors", "ids.safetensors"])
def test_one_changed_bit_is_found(tmp_path: Path, file: str) -> None:
    path = tmp_path / _store(tmp_path).key / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CalibrationError, match=rf"must be whole: .*{file}: its content is not what was written"
    ):
        _ = _store(tmp_path).linears["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("content", ["", "[]", '{"made_by": {}}', "{"])
def test_a_damaged_index_is_found(tmp_path: Path, content: str) -> None:
    path = tmp_path / _store(tmp_path).key
    (path / "index.json").write_text(content)
    with pytest.raises(CalibrationError, match=r"must be whole: .*index\.json.*Delete the folder"):
        open_calibration(path)


def test_a_missing_layer_is_found(tmp_path: Path) -> None:
    stored = _store(tmp_path)
    (tmp_path / stored.key / "model.layers.0.safetensors").unlink()
    with pytest.raises(CalibrationError, match=r"must be whole: .*layers\.0.*No such file"):
        _ = stored.linears["model.layers.0.mlp.up_proj"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="writable"):
        _store(tmp_path / "file")


def _edit(path: Path, **changes: Any) -> None:
    index = json.loads((path / "index.json").read_text())
    index["made_by"] |= changes
    (path / "index.json").write_text(json.dumps(index))


def _never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("computed again")

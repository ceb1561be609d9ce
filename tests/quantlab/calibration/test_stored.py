"""Stored calibrations are read as they were computed, and whatever is not as it was written is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlab.calibration.collect import calibrate
from quantlab.calibration.stored import open_calibration
from quantlab.errors import CalibrationError
from tests import toys
from tests.quantlab.calibration.toy_calibrations import ids, store


def test_what_is_read_is_what_was_computed(tmp_path: Path) -> None:
    stored, expected = store(tmp_path), calibrate(toys.toy_model(), ids())
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


def test_linears_that_share_an_input_share_one_gram_on_disk_and_in_memory(tmp_path: Path) -> None:
    stored = store(tmp_path)
    q, k = (stored.linears[f"model.layers.0.self_attn.{each}_proj"] for each in "qk")
    assert q.gram_II is k.gram_II
    down = stored.linears["model.layers.0.mlp.down_proj"].gram_II
    sizes = [path.stat().st_size for path in (tmp_path / stored.key).glob("model.*")]
    grams = 3 * q.gram_II.numel() + down.numel()
    assert len(sizes) == 2 and all(size < 4 * grams * 1.5 for size in sizes)


def test_a_linear_that_no_token_reaches_is_stored_without_its_gram(tmp_path: Path) -> None:
    model = toys.toy_model()
    model.model.layers[1].mlp.spare = nn.Linear(7, 3)
    stats = store(tmp_path, model).linears["model.layers.1.mlp.spare"]
    assert stats.num_tokens == 0 and stats.gram_II.shape == (7, 7)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / store(tmp_path).key
    _edit(path, format_version=0)
    with pytest.raises(
        CalibrationError, match=r"must be of format version 1: .* is of version 0\. Delete the folder"
    ):
        store(tmp_path)


def test_another_checkpoints_calibration_is_refused(tmp_path: Path) -> None:
    """A folder that was given the name of another."""
    path = tmp_path / store(tmp_path).key
    _edit(path, checkpoint="xyz")
    with pytest.raises(CalibrationError, match=r"was made by checkpoint 'xyz', asked for is 'abc'\. Delete"):
        store(tmp_path)


@pytest.mark.parametrize("file", ["model.layers.1.safetensors", "ids.safetensors"])
def test_one_changed_bit_is_found(tmp_path: Path, file: str) -> None:
    path = tmp_path / store(tmp_path).key / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CalibrationError, match=rf"must be whole: .*{file}: its content is not what was written"
    ):
        _ = store(tmp_path).linears["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("content", ["", "[]", '{"made_by": {}}', "{"])
def test_a_damaged_index_is_found(tmp_path: Path, content: str) -> None:
    path = tmp_path / store(tmp_path).key
    (path / "index.json").write_text(content)
    with pytest.raises(CalibrationError, match=r"must be whole: .*index\.json.*Delete the folder"):
        open_calibration(path)


def test_a_missing_layer_is_found(tmp_path: Path) -> None:
    stored = store(tmp_path)
    (tmp_path / stored.key / "model.layers.0.safetensors").unlink()
    with pytest.raises(CalibrationError, match=r"must be whole: .*layers\.0.*No such file"):
        _ = stored.linears["model.layers.0.mlp.up_proj"]


def _edit(path: Path, **changes: Any) -> None:
    index = json.loads((path / "index.json").read_text())
    index["made_by"] |= changes
    (path / "index.json").write_text(json.dumps(index))

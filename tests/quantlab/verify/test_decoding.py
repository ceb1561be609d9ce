"""The decoder of compressed-tensors finds the codes and scales that the quantizer chose, at every width."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantlab.errors import CheckpointError
from quantlab.manifest import read_manifest
from quantlab.reading.compressed_tensors import decode, linears
from quantlab.reading.raw import RawFolder
from tests.quantlab.verify.folders import LINEAR, changed_json, exported


@pytest.mark.parametrize("scheme", ["w2g32", "w3g32", "w4", "w5", "w6g32", "w7", "w8g32", "w8a8", "fp8"])
def test_digests_are_those_of_the_manifest(scheme: str, toy_folder: Path, tmp_path: Path) -> None:
    folder = exported(toy_folder, tmp_path / "out", scheme)
    raw, chosen = RawFolder(folder), read_manifest(folder)["tensors"]
    names = linears(raw)
    assert sorted(chosen) == names and len(names) == 14
    assert {name: decode(raw, name).digests() for name in names} == chosen


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("weight_shape", np.array([96, 65]), "packed words must fit the shape"),
        ("weight_shape", np.array([-96, -64]), "packed words must fit the shape"),
        ("weight_shape", np.array([96]), "is I64 \\[1\\], not I64 \\[2\\]"),
        ("weight_shape", np.array([2**40, 64]), "packed words must fit the shape"),
        ("weight_packed", np.zeros((96, 8), np.int64), "is I64 \\[96, 8\\], not I32"),
        ("weight_scale", np.zeros((96, 3), np.float32), "scales must be one a row or one a group"),
        ("weight_scale", np.zeros((95, 2), np.float32), "scales must be one a row or one a group"),
        ("weight_scale", np.zeros((96, 2), np.int8), "a tensor of floats was expected"),
        ("weight_zero_point", np.zeros((96, 2), np.int8), "must be a symmetric matrix"),
        ("weight_g_idx", np.zeros(64, np.int32), "must be a symmetric matrix with neighbours in its groups"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    low_bit_folder: Path, tmp_path: Path, leaf: str, value: Any, message: str
) -> None:
    folder = Path(shutil.copytree(low_bit_folder, tmp_path / "bad"))
    tensors = load_file(folder / "model.safetensors") | {f"{LINEAR}.{leaf}": value}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        decode(RawFolder(folder), LINEAR)


def test_unused_bits_and_unknown_layouts_are_refused(toy_folder: Path, tmp_path: Path) -> None:
    folder = exported(toy_folder, tmp_path / "out", "w5")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj"
    # 96 codes of 5 bits fill 15 words; a 97th would begin where nothing may be.
    tensors[f"{name}.weight_shape"] = np.array([64, 95])
    tensors[f"{name}.weight_packed"][0, -1] = -1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="unused bits of packed words must be 0"):
        decode(RawFolder(folder), name)
    for changes, message in (
        ({"config_groups": {}}, "one group of weights of 1 to 8 bits"),
        ({"config_groups": {"a": {"weights": {"num_bits": 9}}}}, "one group of weights of 1 to 8 bits"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}, "format": "x"}}}, "is 'x' of 4 bits"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}, "format": "int-quantized"}}}, "of 4 bits"),
    ):
        quantization = {"quant_method": "compressed-tensors"} | changes
        changed_json(folder / "config.json", quantization_config=quantization)
        with pytest.raises(CheckpointError, match=message):
            decode(RawFolder(folder), name)

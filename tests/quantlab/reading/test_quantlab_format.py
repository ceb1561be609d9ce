"""Folders in quantlab's own format that are not what they say: refused in one sentence, before memory is taken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.errors import CheckpointError
from quantlab.reading import quantlab_format as reading
from quantlab.reading.raw import RawFolder
from tests.quantlab.export.toy_folders import export
from tests.toys import save_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    source = save_checkpoint("llama", folder / "toy", intermediate_size=256)
    return export(source, "nf4", "quantlab", folder / "out")


Q_PROJ = "model.layers.0.self_attn.q_proj"


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one linear's entry."""
    return lambda config: config["linears"][Q_PROJ].update(changes)


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda c: c.update(version=2), "read in version 1: .* has 2"),
    "version is true": (lambda c: c.update(version=True), "read in version 1: .* has True"),
    "no linears": (lambda c: c.update(linears={}), "must describe 1 to 200000 linears"),
    "linears is a list": (lambda c: c.update(linears=[]), "must describe 1 to 200000 linears"),
    "entry is a number": (lambda c: c["linears"].update({Q_PROJ: 3}), "must be one of affine, table"),
    "no name": (lambda c: c["linears"].update({"": {}}), "printable name"),
    "control letters": (lambda c: c["linears"].update({"a\x00": {}}), "printable name"),
    "kind": (entry(kind="eval"), "must be one of affine, table"),
    "bits": (entry(bits=9), "must have 2 to 8 bits, not 9"),
    "bits is a float": (entry(bits=4.0), r"must have 2 to 8 bits, not 4\.0"),
    "shape is huge": (entry(shape=[2**40, 64]), "must have a shape of two sizes"),
    "shape is negative": (entry(shape=[-64, 64]), "must have a shape of two sizes"),
    "shape is another": (entry(shape=[64, 128], scale=[64, 2]), r"is U8 \[64, 32\], not U8 \[64, 64\]"),
    "scale does not divide": (entry(scale=[64, 3]), "must have scales that divide"),
    "scale of another shape": (entry(scale=[64, 2]), r"is F32 \[64, 1\], not F32 \[64, 2\]"),
    "scale type": (entry(scale_type="f5"), "must have scales of float, e8m0 or e4m3, not 'f5'"),
    "scales are not e8m0": (entry(scale_type="e8m0"), r"is F32 \[64, 1\], not U8 \[64, 1\]"),
    "table": (entry(table="nf5"), "must name a table, not 'nf5'"),
    "table is missing": (lambda c: c.pop("tables"), "must name a table"),
    "table is short": (lambda c: c["tables"]["nf4"].update(shape=[8]), "8 hexadecimal digits for each"),
    "table of another width": (
        lambda c: c["tables"]["nf4"].update(shape=[2], float32="00" * 8),
        "table of 16 values, not",
    ),
    "table is no number": (lambda c: c["tables"]["nf4"].update(float32="z" * 128), "must be hexadecimal"),
    "table has spaces": (lambda c: c["tables"]["nf4"].update(float32="  " * 32 + "00" * 32), "hexadecimal"),
    "block": (entry(kind="block", block="Q9_K"), "must name a block of Q8_0"),
    "block of other bits": (entry(kind="block", block="Q8_0"), "must have the bits and scales of Q8_0"),
    "same as nothing": (entry(kind="same", **{"as": "x"}), "must be the same as a linear of its shape"),
    "a tensor is left out": (
        lambda c: c["linears"][Q_PROJ].update(kind="float"),
        "must speak of its codes, which is stored",
    ),
    "zero points": (entry(kind="affine", zero_point="odd"), "must have zero points that are whole or real"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_description_is_refused_in_one_sentence(good: Path, tmp_path: Path, fault: str) -> None:
    change, says = BAD[fault]
    shutil.copytree(good, tmp_path / "bad")
    body = json.loads((good / "config.json").read_text())
    change(body["quantization_config"])
    (tmp_path / "bad/config.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=says) as caught:
        reading.linears(RawFolder(tmp_path / "bad"))
        reading.decode(RawFolder(tmp_path / "bad"), Q_PROJ)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_bad_tensors_are_refused(good: Path, tmp_path: Path) -> None:
    def spoiled(name: str, tensor: torch.Tensor | None) -> RawFolder:
        shutil.copytree(good, tmp_path / "bad", dirs_exist_ok=True)
        tensors = load_file(good / "model.safetensors")
        del tensors[name]
        save_file(tensors if tensor is None else tensors | {name: tensor}, tmp_path / "bad/model.safetensors")
        return RawFolder(tmp_path / "bad")

    with pytest.raises(CheckpointError, match="lacks a tensor of its format"):
        reading.decode(spoiled(f"{Q_PROJ}.codes", None), Q_PROJ)
    with pytest.raises(CheckpointError, match=r"is I32 \[64, 8\], not U8 \[64, 32\]"):
        reading.decode(spoiled(f"{Q_PROJ}.codes", torch.zeros(64, 8, dtype=torch.int32)), Q_PROJ)
    with pytest.raises(CheckpointError, match="scales must be finite"):
        reading.decode(spoiled(f"{Q_PROJ}.scale", torch.full((64, 1), torch.nan)), Q_PROJ)
    with pytest.raises(CheckpointError, match="floats was expected"):
        reading.decode(spoiled(f"{Q_PROJ}.scale", torch.zeros(64, 1, dtype=torch.int32)), Q_PROJ)
    with pytest.raises(CheckpointError, match="must hold codes to be decoded"):
        reading.decode(RawFolder(good), "model.norm")

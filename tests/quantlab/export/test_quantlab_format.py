"""quantlab's own format: what the writer chose is what its decoder and the stand-alone reader find, bit for bit."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantlab.calibration.calibrator import Calibrator
from quantlab.config import CheckpointConfig, QuantizeConfig
from quantlab.errors import CheckpointError
from quantlab.export.folder import ExportSummary, export_checkpoint
from quantlab.export.quantlab_format.rows import pack_rows
from quantlab.manifest import read_manifest
from quantlab.models.loading import Checkpoint, load_checkpoint
from quantlab.reading import quantlab_format as reading
from quantlab.reading.raw import RawFolder
from quantlab.schemes import Scheme
from tests.toys import NUM_TOKENS, save_checkpoint

LINEARS = 14


def loaded(folder: Path, **options: Any) -> Checkpoint:
    return load_checkpoint(CheckpointConfig(path=str(folder), device="cpu", **options))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Llama whose widths every block divides: 64 and 256."""
    return loaded(save_checkpoint("llama", tmp_path_factory.mktemp("own") / "toy", intermediate_size=256))


def export(checkpoint: Checkpoint, out: Path, scheme: str, **options: Any) -> ExportSummary:
    parsed = Scheme.parse(scheme)
    ids = torch.randint(0, NUM_TOKENS, (2, 16), generator=torch.Generator().manual_seed(0))
    calibrator = Calibrator(ids, batch_size=2) if parsed.needs else None
    return export_checkpoint(
        checkpoint, parsed, "quantlab", out, calibrator=calibrator, config=QuantizeConfig(**options)
    )


def stand_alone() -> ModuleType:
    """docs/read_quantlab.py, which is no part of a package."""
    file = Path(__file__).parents[3] / "docs/read_quantlab.py"
    assert len(file.read_text().splitlines()) <= 60
    spec = importlib.util.spec_from_file_location("read_quantlab", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STORED = {
    "w2g64": 2 + 32 / 64,
    "w4g32": 4 + 32 / 32,
    "w4g32z": 4 + (32 + 4) / 32,
    "w5g64": 5 + 32 / 64,
    "w7g32": 7 + 32 / 32,
    "w8g64": 8 + 32 / 64,
    "w4g32z-hqq": 4 + 64 / 32,
    "nf4": 4 + 32 / 64,
    "mxfp4": 4 + 8 / 32,
    "mxfp6": 6 + 8 / 32,
    "q8_0": 8.5,
    "q4_1": 5.0,
}
"""Scheme -> bits on disk per weight; scales are float32, as the toy is."""
OTHERS = [
    "w3g16z",
    "w6g32z",
    "w4t",
    "w8",
    "w3tz",
    "fp8",
    "fp8e5m2",
    "nvfp4",
    "llm_int8",
    "q6_k",
    "q5_k",
    "q4_k",
    "q3_k",
    "q5_0",
    "q4_0",
]


@pytest.mark.parametrize("scheme", [*STORED, *OTHERS])
def test_codes_are_found_again_bit_for_bit(toy: Checkpoint, tmp_path: Path, scheme: str) -> None:
    summary = export(toy, tmp_path / "out", scheme)
    raw, alone = RawFolder(tmp_path / "out"), stand_alone().read(tmp_path / "out")
    digests = read_manifest(tmp_path / "out")["tensors"]
    assert sorted(digests) == reading.linears(raw) == sorted(alone) and len(digests) == LINEARS
    for name, chosen in digests.items():
        decoded = reading.decode(raw, name)
        assert decoded.digests() == chosen
        assert alone[name].dtype == np.float32
        assert alone[name].tobytes() == decoded.real().tobytes()
    if scheme in STORED:
        assert summary.average_storage_bits == STORED[scheme]


def test_scales_of_bfloat16_are_stored_as_such(tmp_path: Path) -> None:
    folder = save_checkpoint("llama", tmp_path / "in", dtype="bfloat16", intermediate_size=256)
    summary = export(loaded(folder, dtype="bfloat16"), tmp_path / "out", "w4g32z")
    alone = stand_alone().read(tmp_path / "out")
    for name, chosen in read_manifest(tmp_path / "out")["tensors"].items():
        decoded = reading.decode(RawFolder(tmp_path / "out"), name)
        assert decoded.digests() == chosen
        assert alone[name].tobytes() == decoded.real().tobytes()
    assert summary.average_storage_bits == 4 + (16 + 4) / 32


@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_of_bits_are_as_the_layout_says(bits: int) -> None:
    codes = torch.randint(
        0, 2**bits, (3, 13), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8
    )
    packed = pack_rows(codes, bits)
    assert packed.shape == (3, (13 * bits + 7) // 8)
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (place * bits) for place, code in enumerate(row))
        assert bytes(stream) == number.to_bytes(len(stream), "little")


def test_widths_of_a_mixed_scheme_stand_in_their_entries(toy: Checkpoint, tmp_path: Path) -> None:
    widths = {"*.q_proj": "w3g16z", "*.down_proj": "w8", "*.o_proj": "w16"}
    export(toy, tmp_path / "out", "w4g32-mixed", widths=widths)
    entries = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["linears"]
    of = {name.rpartition(".")[2]: entry.get("weights") for name, entry in entries.items()}
    assert of["q_proj"] == "w3g16z" and of["down_proj"] == "w8" and of["k_proj"] == "w4g32"
    assert {entry["kind"] for name, entry in entries.items() if name.endswith("o_proj")} == {"float"}
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        kept = file.get_tensor("model.layers.0.self_attn.o_proj.weight")
    assert torch.equal(kept, toy.model.get_submodule("model.layers.0.self_attn.o_proj").weight)


@pytest.fixture(scope="module")
def good(toy: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "out"
    export(toy, out, "nf4")
    return out


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

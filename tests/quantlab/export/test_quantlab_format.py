"""quantlab's own format: what the writer chose is what its decoder and the stand-alone reader find, bit for bit."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from quantlab.calibration.calibrator import Calibrator
from quantlab.config import CheckpointConfig, QuantizeConfig
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

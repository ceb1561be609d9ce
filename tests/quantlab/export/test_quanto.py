"""quanto's folders: what optimum-quanto loads is our codes, in groups that it chooses itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantlab.config import QuantizeConfig
from quantlab.errors import CheckpointError, SchemeError
from quantlab.export.folder import export_checkpoint
from quantlab.export.formats import find_format
from quantlab.export.linear_shapes import quanto_group
from quantlab.export.quanto import pack_planes
from quantlab.reading import quanto as decoder
from quantlab.reading.raw import RawFolder
from quantlab.reading.readers import decoder_of
from quantlab.schemes import Scheme
from quantlab.verify.engines import quanto as engine
from tests.quantlab.export.toy_folders import (
    assert_decoded,
    chosen_codes,
    damaged,
    dequantized_logits,
    export,
    linear_outputs,
    loaded,
    save_toy,
    simulated_logits,
    token_ids,
)

peer: Any = pytest.importorskip("optimum.quanto")

SOURCES: dict[str, tuple[str, torch.dtype, int]] = {
    "llama": ("llama", torch.float32, 256),  # groups: 64 inputs whole, 256 by 128
    "llama-192": ("llama", torch.float32, 192),  # 192 by 96
    "diffllama": ("diffllama", torch.float32, 256),
    "llama-bfloat16": ("llama", torch.bfloat16, 256),
}
CASES = [
    *(("llama", scheme) for scheme in ("w8", "w4", "w4z", "w2", "w2z")),
    *(("llama-192", scheme) for scheme in ("w4", "w4z")),
    *(("diffllama", scheme) for scheme in ("w8", "w4z")),
    *(("llama-bfloat16", scheme) for scheme in ("w8", "w4", "w2z")),
]
U32, U_BF16 = 2.0**-24, 2.0**-8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources by name, and exports as SOURCE-SCHEME."""
    root = tmp_path_factory.mktemp("quanto")
    for name, (family, dtype, width) in SOURCES.items():
        save_toy(family, root / name, dtype, width)
    for source, scheme in CASES:
        export(root / source, scheme, "quanto", root / f"{source}-{scheme}")
    return root


def logits(folder: Path) -> Tensor:
    forward = engine.load(str(folder))
    return torch.stack([torch.from_numpy(forward(row)[0]) for row in token_ids().tolist()])


def quantos_own(source: Path, kind: str, out: Path) -> Path:
    """What quanto makes of a float checkpoint by itself."""
    model = AutoModelForCausalLM.from_pretrained(source)
    peer.QuantizedModelForCausalLM.quantize(model, weights=kind, exclude="lm_head").save_pretrained(out)
    return out


@pytest.mark.parametrize(("source", "scheme"), CASES)
def test_codes_and_scales_are_decoded_bit_for_bit(folders: Path, source: str, scheme: str) -> None:
    assert_decoded(decoder, folders / f"{source}-{scheme}", chosen_codes(folders / source, scheme))


@pytest.mark.parametrize(("source", "scheme"), [case for case in CASES if "bfloat16" not in case[0]])
def test_quanto_loads_our_simulated_model(folders: Path, source: str, scheme: str) -> None:
    found = logits(folders / f"{source}-{scheme}")
    assert engine.ARITHMETIC() == "float32"
    assert torch.equal(found, simulated_logits(folders / source, scheme))
    model = engine.load_model(str(folders / f"{source}-{scheme}"))
    for name, decoded in chosen_codes(folders / source, scheme).items():
        assert torch.equal(model.get_submodule(name).weight.dequantize(), torch.from_numpy(decoded.real()))


@pytest.mark.parametrize("scheme", ["w8", "w4", "w2z"])
def test_bfloat16_only_rounds_weights_and_outputs(folders: Path, scheme: str) -> None:
    """Three kernels: int8 codes scaled after the product, packed int4, and matrices that become floats."""
    model = engine.load_model(str(folders / f"llama-bfloat16-{scheme}"))
    assert engine.ARITHMETIC() == "bfloat16"
    chosen = chosen_codes(folders / "llama-bfloat16", scheme)
    for name, (x, y) in linear_outputs(model, chosen).items():
        real = torch.from_numpy(chosen[name].real()).double()
        exact, sizes = x.double() @ real.t(), x.double().abs() @ real.abs().t()
        bound = sizes * ((1 + (x.shape[-1] + 1) * U32) * (1 + U_BF16) ** 2 - 1)
        excess = (y.double() - exact).abs() - bound
        assert (excess <= 0).all(), f"{name}: {excess.max():.3e} beyond the bound"


def test_eight_bits_are_the_file_that_quanto_saves(folders: Path, tmp_path: Path) -> None:
    own = quantos_own(folders / "llama", "qint8", tmp_path / "own")
    expected, found = (load_file(path / "model.safetensors") for path in (own, folders / "llama-w8"))
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    maps = [json.loads((path / "quanto_qmap.json").read_text()) for path in (own, folders / "llama-w8")]
    assert maps[0] == maps[1]
    decoded = decoder_of(RawFolder(with_tokenizer(folders, own))).decode(RawFolder(own), NAME)
    assert decoded.digests() == chosen_codes(folders / "llama", "w8")[NAME].digests()


def with_tokenizer(folders: Path, folder: Path) -> Path:
    (folder / "tokenizer.json").write_bytes((folders / "llama" / "tokenizer.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("source", "kind", "scheme"), [("llama", "qint4", "w4z"), ("llama-192", "qint4", "w4")]
)
def test_four_bits_are_laid_out_as_quanto_saves_them(
    folders: Path, tmp_path: Path, source: str, kind: str, scheme: str
) -> None:
    own = quantos_own(folders / source, kind, tmp_path / "own")
    expected, found = (
        load_file(path / "model.safetensors") for path in (own, folders / f"{source}-{scheme}")
    )
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in expected.items()}
    # Zero points are whole numbers here, as quanto's optimizers make them when asked to.
    shapes |= {n: (torch.uint8, s) for n, (_, s) in shapes.items() if n.endswith("_shift")}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == shapes


@pytest.mark.parametrize("num_inputs", [32, 64, 100, 128, 160, 192, 256, 288, 320, 576, 1000, 1536, 4096])
def test_groups_are_those_that_quanto_chooses(num_inputs: int) -> None:
    linear = torch.nn.Linear(num_inputs, 4, bias=False)
    own = peer.QLinear.from_module(linear, weights=peer.qint4).weight_group_size
    assert quanto_group(num_inputs) == (own or num_inputs)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("height", [1, 2, 3, 5, 8, 13, 64])
def test_bytes_are_packed_as_quanto_packs_them(bits: int, height: int) -> None:
    pack_weights = pytest.importorskip("optimum.quanto.tensor.packed").pack_weights
    codes = torch.randint(0, 2**bits, (height, 6), generator=torch.Generator().manual_seed(height)).byte()
    assert torch.equal(pack_planes(codes, bits), pack_weights(codes, bits))


def test_transformers_stops_at_such_a_folder(folders: Path) -> None:
    """Without the entry in config.json it would fill the weights with random numbers and only log so."""
    with pytest.raises(ValueError, match="found qint4"):
        AutoModelForCausalLM.from_pretrained(folders / "llama-w4")


def test_skipped_linears_and_shards_load(folders: Path, tmp_path: Path) -> None:
    out, skipped = tmp_path / "out", "model.layers.1.mlp.down_proj"
    config = QuantizeConfig(skip=["*.down_proj"])
    export_checkpoint(
        loaded(folders / "llama"), Scheme.parse("w4g64"), "quanto", out, config=config, max_shard_size=100_000
    )
    assert len(list(out.glob("*.safetensors"))) > 2
    assert skipped not in decoder.linears(RawFolder(out))
    chosen = chosen_codes(folders / "llama", "w4g64")
    kept = {name: decoded for name, decoded in chosen.items() if not name.endswith("down_proj")}
    assert torch.equal(logits(out), dequantized_logits(folders / "llama", kept))


# ---- refusals


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("nf4", "its weights are nf4"),
        ("w6", "weights need 2, 4 or 8 bits"),
        ("w8g32", "8-bit weights need a symmetric grid"),
        ("w8z", "8-bit weights need a symmetric grid"),
        ("w8a8", "quantizes inputs of linears too"),
        ("w4z-hqq", "its zero points are real numbers"),
    ],
)
def test_other_schemes_are_refused(scheme: str, reason: str) -> None:
    with pytest.raises(SchemeError, match=f"{reason}.*It holds w8"):
        find_format("quanto").check(Scheme.parse(scheme))


@pytest.mark.parametrize(
    ("source", "scheme", "reason"),
    [
        ("llama", "w4g64", r"cuts 256 inputs in groups of 128: .*down_proj has groups of 64.*Use w4, "),
        ("llama", "w2g32", r"cuts 64 inputs in groups of 64: .*q_proj has groups of 32"),
        ("llama-bfloat16", "w4z", r"rounds 4-bit zero points in groups of 128 to bfloat16: .*down_proj"),
    ],
)
def test_groups_that_quanto_would_not_choose_are_refused(
    folders: Path, tmp_path: Path, source: str, scheme: str, reason: str
) -> None:
    with pytest.raises(SchemeError, match=reason):
        export(folders / source, scheme, "quanto", tmp_path / "out")
    assert not (tmp_path / "out").exists()


NAME = "model.layers.0.mlp.down_proj"
Change = Callable[[dict[str, Tensor], str], object]
BROKEN: dict[str, tuple[Change, str]] = {
    "no scale": (lambda t, n: t.pop(f"{n}.weight._scale"), "lacks a tensor"),
    "fewer bytes": (
        lambda t, n: t.update({f"{n}.weight._data._data": t[f"{n}.weight._data._data"][1:].clone()}),
        "fill their matrix",
    ),
    "one dimension": (
        lambda t, n: t.update({f"{n}.weight._data._data": torch.zeros(8).byte()}),
        "fill their",
    ),
    "zero point too large": (lambda t, n: t[f"{n}.weight._shift"][:1].fill_(16), r"within 0 \.\. 15"),
    "zero point of another group": (
        lambda t, n: t[f"{n}.weight._shift"][:1].add_(1),
        "one group must be equal",
    ),
    "scale of another group": (lambda t, n: t[f"{n}.weight._scale"][:1].mul_(2), "one group must be equal"),
    "floats that are no zero points": (
        lambda t, n: t.update({f"{n}.weight._shift": torch.ones(128, 1)}),
        "of a symmetric grid must be 8",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_folder_is_refused(folders: Path, tmp_path: Path, damage: str) -> None:
    change, message = BROKEN[damage]
    raw = damaged(folders / "llama-w4", tmp_path / "out", change, NAME)
    with pytest.raises(CheckpointError, match=message):
        decoder.decode(raw, NAME)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "need the shapes of their matrices"),
        ({"shapes": {NAME: [64, -1]}}, "need the shapes of their matrices"),
        ({"shapes": {NAME: [64, 256]}, "group_size": 64}, "whole groups of 128"),
        ({"shapes": {NAME: [128, 128]}, "group_size": 10**30}, "whole groups of 128"),
        ({"shapes": {NAME: [256, 64]}}, "groups must divide a row"),
        ({"shapes": {NAME: [2**40, 2**40]}}, "fill their matrix"),
    ],
)
def test_false_facts_are_refused(folders: Path, tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    raw = damaged(folders / "llama-w4z", tmp_path / "out", lambda tensors, name: None, NAME)
    raw.config = {"quantization_config": facts}
    with pytest.raises(CheckpointError, match=message):
        decoder.decode(raw, NAME)

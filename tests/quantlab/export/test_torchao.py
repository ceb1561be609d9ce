"""torchao's folders: what transformers and torchao load is our codes, whatever the width."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from quantlab.config import QuantizeConfig
from quantlab.errors import CheckpointError, SchemeError
from quantlab.export.folder import export_checkpoint
from quantlab.export.formats import find_format
from quantlab.reading import torchao as decoder
from quantlab.reading.raw import RawFolder
from quantlab.schemes import Scheme, TensorSpec
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

peer: Any = pytest.importorskip("torchao.quantization")

SOURCES = {
    "llama": ("llama", torch.float32),
    "diffllama": ("diffllama", torch.float32),
    "llama-bfloat16": ("llama", torch.bfloat16),
}
CASES = [
    *(
        ("llama", scheme)
        for scheme in ("w8", "w8g32", "w8z", "w6", "w4", "w4g32", "w4g32z", "w3g64", "w2g16z")
    ),
    *(("diffllama", scheme) for scheme in ("w8", "w4g32")),
    *(("llama-bfloat16", scheme) for scheme in ("w8", "w4g32", "w5z")),
]
U = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources by name, and exports as SOURCE-SCHEME."""
    root = tmp_path_factory.mktemp("torchao")
    for name, (family, dtype) in SOURCES.items():
        save_toy(family, root / name, dtype)
    for source, scheme in CASES:
        export(root / source, scheme, "torchao", root / f"{source}-{scheme}")
    return root


def settings(scheme: str) -> TorchAoConfig:
    """What a user of transformers asks for to get such a folder."""

    spec = Scheme.parse(scheme).weights
    assert isinstance(spec, TensorSpec)
    if spec.bits == 8 and spec.symmetric:
        per_group = {"granularity": peer.PerGroup(spec.group_size)} if spec.group_size else {}
        return TorchAoConfig(peer.Int8WeightOnlyConfig(**per_group))
    return TorchAoConfig(
        peer.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{spec.bits}"),
            granularity=peer.PerGroup(spec.group_size) if spec.group_size else peer.PerAxis(0),
            mapping_type=peer.MappingType.SYMMETRIC if spec.symmetric else peer.MappingType.ASYMMETRIC,
        )
    )


def read(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **more)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(token_ids()).logits
    return found.float()


def header(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize(("source", "scheme"), CASES)
def test_codes_and_scales_are_decoded_bit_for_bit(folders: Path, source: str, scheme: str) -> None:
    assert_decoded(decoder, folders / f"{source}-{scheme}", chosen_codes(folders / source, scheme))


@pytest.mark.parametrize(("source", "scheme"), CASES)
def test_the_files_are_laid_out_as_transformers_saves_them(
    folders: Path, tmp_path: Path, source: str, scheme: str
) -> None:
    read(folders / source, quantization_config=settings(scheme)).save_pretrained(tmp_path)
    ours = folders / f"{source}-{scheme}"
    expected, found = (load_file(folder / "model.safetensors") for folder in (tmp_path, ours))
    assert {k: (t.dtype, t.shape) for k, t in found.items()} == {
        k: (t.dtype, t.shape) for k, t in expected.items()
    }
    theirs, written = header(tmp_path), header(ours)
    assert {k: v if k == "format" else json.loads(v) for k, v in written.items()} == {
        k: v if k == "format" else json.loads(v) for k, v in theirs.items()
    }
    config, saved = (
        json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (ours, tmp_path)
    )
    assert config == saved | {"modules_to_not_convert": ["lm_head"]}


@pytest.mark.parametrize(("source", "scheme"), CASES)
def test_transformers_loads_our_weights(folders: Path, source: str, scheme: str) -> None:
    model, dtype = read(folders / f"{source}-{scheme}"), SOURCES[source][1]
    chosen = chosen_codes(folders / source, scheme)
    for name, decoded in chosen.items():
        weight = model.get_submodule(name).weight
        assert type(weight.data).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor")
        assert torch.equal(weight.dequantize(), torch.from_numpy(decoded.real()).to(dtype)), name
    if scheme == "w8":
        return
    found = logits(model)
    if dtype == torch.float32:
        assert torch.equal(found, simulated_logits(folders / source, scheme))
    assert torch.equal(found, dequantized_logits(folders / source, chosen))


@pytest.mark.parametrize("source", SOURCES)
def test_eight_bits_per_channel_are_scaled_after_the_product(folders: Path, source: str) -> None:
    """Their order of operations: the product of codes is rounded, then scaled and rounded again."""
    chosen, u = chosen_codes(folders / source, "w8"), U[SOURCES[source][1]]
    for name, (x, y) in linear_outputs(read(folders / f"{source}-w8"), chosen).items():
        real = torch.from_numpy(chosen[name].real()).double()
        exact, sizes = x.double() @ real.t(), x.double().abs() @ real.abs().t()
        # Sums are float32 in both dtypes; a real weight itself is a product rounded to float32.
        bound = sizes * ((1 + (x.shape[-1] + 1) * U[torch.float32]) * (1 + u) ** 2 - 1)
        excess = (y.double() - exact).abs() - bound
        assert (excess <= 0).all(), f"{name}: {excess.max():.3e} beyond the bound"


def test_a_skipped_linear_stays_as_it_is(folders: Path, tmp_path: Path) -> None:
    skipped = "model.layers.1.mlp.up_proj"
    config = QuantizeConfig(skip=[skipped])
    out = tmp_path / "out"
    export_checkpoint(loaded(folders / "llama"), Scheme.parse("w4g32"), "torchao", out, config=config)
    weight = read(out).get_submodule(skipped).weight
    assert type(weight) is nn.Parameter and type(weight.data) is Tensor
    assert skipped not in decoder.linears(RawFolder(out))


def test_shards_load_too(folders: Path, tmp_path: Path) -> None:
    export_checkpoint(
        loaded(folders / "llama"), Scheme.parse("w4g32"), "torchao", tmp_path / "out", max_shard_size=100_000
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert torch.equal(logits(read(tmp_path / "out")), logits(read(folders / "llama-w4g32")))


def test_a_code_takes_a_byte_and_the_summary_says_so(folders: Path, tmp_path: Path) -> None:
    made = export_checkpoint(loaded(folders / "llama"), Scheme.parse("w4g32"), "torchao", tmp_path / "out")
    assert made.average_storage_bits == 8 + (32 + 8) / 32


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("nf4", "its weights are nf4"),
        ("w8a8", "quantizes inputs of linears too"),
        ("w4g64z-hqq", "its zero points are real numbers"),
        ("w4t", "a scale per channel or per group"),
        ("a8", "leaves the weights at 16 bits"),
    ],
)
def test_other_schemes_are_refused(scheme: str, reason: str) -> None:
    with pytest.raises(SchemeError, match=f"{reason}.*It holds weights of 2 to 8 bits"):
        find_format("torchao").check(Scheme.parse(scheme))


KINDS = {"scale": torch.float32, "zero_point": torch.int8}
NAME = "model.layers.0.mlp.up_proj"
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor], str], object], str]] = {
    "code too large": (lambda t, n: t[f"{n}._weight_qdata"][0, :1].fill_(8), r"within -8 \.\. 7"),
    "zero point on a symmetric grid": (
        lambda t, n: t[f"{n}._weight_zero_point"][0, :1].fill_(1),
        "zero points of a symmetric grid be 0",
    ),
    "scales of another height": (
        lambda t, n: t.update(
            {f"{n}._weight_{kind}": torch.ones(3, 2, dtype=d) for kind, d in KINDS.items()}
        ),
        "equal height",
    ),
    "scales that do not divide": (
        lambda t, n: t.update(
            {f"{n}._weight_{kind}": torch.ones(128, 3, dtype=d) for kind, d in KINDS.items()}
        ),
        "split a row evenly",
    ),
    "no scale": (lambda t, n: t.pop(f"{n}._weight_scale"), "lacks a tensor"),
    "codes of another dtype": (
        lambda t, n: t.update({f"{n}._weight_qdata": t[f"{n}._weight_qdata"].int()}),
        "as its format has it",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_folder_is_refused(folders: Path, tmp_path: Path, damage: str) -> None:
    change, message = BROKEN[damage]
    raw = damaged(folders / "llama-w4g32", tmp_path / "out", change, NAME)
    with pytest.raises(CheckpointError, match=message):
        decoder.decode(raw, NAME)


def test_other_kinds_of_torchao_are_refused(folders: Path, tmp_path: Path) -> None:
    raw = damaged(folders / "llama-w4g32", tmp_path / "out", lambda tensors, name: None, NAME)
    quant_type = {"default": {"_type": "Float8WeightOnlyConfig", "_data": {}}}
    raw.config = {"quantization_config": {"quant_method": "torchao", "quant_type": quant_type}}
    with pytest.raises(CheckpointError, match=r"the quant_type of .* is 'Float8WeightOnlyConfig'"):
        decoder.decode(raw, NAME)

"""bitsandbytes' folders: what transformers loads is our codes, and the model that bitsandbytes makes of the weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quantlab.config import QuantizeConfig
from quantlab.errors import CheckpointError, SchemeError
from quantlab.export.bitsandbytes import pack_nibbles
from quantlab.export.folder import export_checkpoint
from quantlab.export.formats import find_format
from quantlab.methods.formats import FORMATS
from quantlab.reading import bitsandbytes as decoder
from quantlab.reading.raw import RawFolder
from quantlab.schemes import Scheme
from tests.quantlab.bnb import load
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

SCHEMES = ["nf4", "fp4", "nf4_dq", "fp4_dq", "llm_int8"]
SOURCES = {
    "llama": ("llama", torch.float32),
    "diffllama": ("diffllama", torch.float32),
    "llama-bfloat16": ("llama", torch.bfloat16),
}
CASES = [
    *(("llama", scheme) for scheme in SCHEMES),
    *(("diffllama", scheme) for scheme in ("nf4", "fp4_dq", "llm_int8")),
    *(("llama-bfloat16", scheme) for scheme in ("nf4_dq", "llm_int8")),
]
U_BF16, U_F32 = 2.0**-8, 2.0**-24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources by name, and exports as SOURCE-SCHEME."""
    load()
    root = tmp_path_factory.mktemp("bitsandbytes")
    for name, (family, dtype) in SOURCES.items():
        save_toy(family, root / name, dtype)
    for source, scheme in CASES:
        export(root / source, scheme, "bitsandbytes", root / f"{source}-{scheme}")
    return root


def settings(scheme: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What a user of transformers asks for to get the scheme."""
    if scheme == "llm_int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind, _, nested = scheme.partition("_")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=bool(nested),
        bnb_4bit_compute_dtype=dtype,
    )


def read(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **more)


def theirs(root: Path, source: str, scheme: str) -> Any:
    """The model that transformers and bitsandbytes make of the float checkpoint."""
    return read(root / source, quantization_config=settings(scheme, SOURCES[source][1]))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(token_ids()).logits
    return found.float()


def without_cpu_kernel(model: Any) -> Any:
    """The model, its 4-bit linears dequantizing: bitsandbytes' kernel for AVX512-BF16 rounds inputs and scales."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize(("source", "scheme"), CASES)
def test_codes_and_scales_are_decoded_bit_for_bit(folders: Path, source: str, scheme: str) -> None:
    assert_decoded(decoder, folders / f"{source}-{scheme}", chosen_codes(folders / source, scheme))


@pytest.mark.parametrize(("source", "scheme"), CASES)
def test_the_files_are_those_that_transformers_saves(
    folders: Path, tmp_path: Path, source: str, scheme: str
) -> None:
    theirs(folders, source, scheme).save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    found = load_file(folders / f"{source}-{scheme}" / "model.safetensors")
    assert sorted(found) == sorted(expected)
    for name, tensor in found.items():
        peer = expected[name]
        assert tensor.dtype == peer.dtype
        if "quant_state" in name:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(peer.tolist()))
        else:
            assert torch.equal(tensor, peer), name
    ours, saved = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (folders / f"{source}-{scheme}", tmp_path)
    )
    assert ours == saved | {"llm_int8_skip_modules": ["lm_head"]}


@pytest.mark.parametrize(("source", "scheme"), CASES)
def test_transformers_loads_the_model_that_bitsandbytes_makes(
    folders: Path, source: str, scheme: str
) -> None:
    found = logits(read(folders / f"{source}-{scheme}"))
    assert torch.isfinite(found).all()
    assert torch.equal(found, logits(theirs(folders, source, scheme)))


@pytest.mark.parametrize(("source", "scheme"), [case for case in CASES if case[1] != "llm_int8"])
def test_four_bits_dequantize_to_our_simulated_model(folders: Path, source: str, scheme: str) -> None:
    found = logits(without_cpu_kernel(read(folders / f"{source}-{scheme}")))
    if SOURCES[source][1] == torch.float32:
        assert torch.equal(found, simulated_logits(folders / source, scheme))
    assert torch.equal(found, dequantized_logits(folders / source, chosen_codes(folders / source, scheme)))


@pytest.mark.parametrize("scheme", ["nf4", "fp4_dq"])
def test_the_cpu_kernel_only_rounds_to_bfloat16(folders: Path, scheme: str) -> None:
    """Inputs, table, scales and outputs are rounded once each, sums are float32: no linear differs by more."""
    model = read(folders / f"llama-{scheme}")
    chosen = chosen_codes(folders / "llama", scheme)
    for name, (x, y) in linear_outputs(model, chosen).items():
        real = torch.from_numpy(chosen[name].real()).double()
        exact, sizes = x.double() @ real.t(), x.double().abs() @ real.abs().t()
        sums = x.shape[-1] * U_F32
        bound = sizes * ((1 + U_BF16) ** 3 * (1 + sums) - 1) * (1 + U_BF16) + exact.abs() * U_BF16
        excess = (y.double() - exact).abs() - bound
        assert (excess <= 0).all(), f"{name}: {excess.max():.3e} beyond the bound"


def test_a_skipped_linear_stays_as_it_is(folders: Path, tmp_path: Path) -> None:
    skipped = "model.layers.1.mlp.up_proj"
    config = QuantizeConfig(skip=[skipped])
    export_checkpoint(
        loaded(folders / "llama"), Scheme.parse("nf4"), "bitsandbytes", tmp_path / "out", config=config
    )
    stored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert stored["llm_int8_skip_modules"] == [skipped, "lm_head"]
    model = read(tmp_path / "out")
    assert type(model.get_submodule(skipped)) is nn.Linear
    assert skipped not in decoder.linears(RawFolder(tmp_path / "out"))
    assert type(model.get_submodule("model.layers.1.mlp.gate_proj")) is not nn.Linear


# ---- double quantization


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(48, 192, generator=generator)
    spread = torch.randn(300, 256, generator=generator) * torch.rand(300, 1, generator=generator) ** 4
    zeros = normal.clone()
    zeros[3:20] = 0.0
    return {
        "normal": normal,
        "small": normal * 1e-3,
        "spread": spread,
        "zeros": zeros,
        "few": normal[:1, :64],
    }


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_quantized_as_bitsandbytes_does(name: str, kind: str, dtype: torch.dtype) -> None:
    functional, weight_OI = load().functional, matrices()[name].to(dtype)
    packed, state = functional.quantize_4bit(weight_OI, compress_statistics=True, quant_type=kind)
    ours = FORMATS[f"{kind}_dq"](weight_OI, "w", scale_dtype=torch.float32)
    nested = ours.nested  # type: ignore[union-attr]
    assert nested is not None
    assert torch.equal(nested.codes, state.absmax)
    assert torch.equal(nested.absmax, state.state2.absmax)
    assert torch.equal(nested.values, state.state2.code)
    assert torch.equal(nested.offset, state.offset)
    assert torch.equal(pack_nibbles(ours.codes), packed)
    used = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(ours.scale.flatten(), used)
    state.dtype = torch.float32
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(packed, state))


def test_scales_take_8_bits_and_a_scale_of_scales() -> None:
    weight_OI = matrices()["normal"]  # 144 scales
    ours = FORMATS["nf4_dq"](weight_OI, "w", scale_dtype=torch.float32)
    assert ours.storage_bits(16) == weight_OI.numel() * 4 + 144 * 8 + 32 + 32


def test_scales_without_a_finite_mean_are_refused() -> None:
    weight_OI = matrices()["normal"].sign() * torch.finfo(torch.float32).max
    with pytest.raises(SchemeError, match=r"finite mean.*those of w reach 3.4e"):
        FORMATS["nf4_dq"](weight_OI, "w", scale_dtype=torch.float32)


# ---- refusals


@pytest.mark.parametrize("scheme", ["w4", "w8a8", "fp8", "mxfp4", "nf4-a8", "q4_k", "l8t"])
def test_other_schemes_are_refused(scheme: str) -> None:
    with pytest.raises(SchemeError, match="It holds nf4, fp4, nf4_dq, fp4_dq and llm_int8"):
        find_format("bitsandbytes").check(Scheme.parse(scheme))


def test_narrow_linears_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="in_features"):
        export(save_toy("llama", tmp_path / "in", width=96), "nf4", "bitsandbytes", tmp_path / "out")
    assert not (tmp_path / "out").exists()


STATE = "quant_state.bitsandbytes__fp4"


def state_of(**changes: Any) -> Tensor:
    """A linear's JSON as bytes."""
    body = {"quant_type": "fp4", "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.1} | changes
    return torch.tensor(list(json.dumps(body).encode()), dtype=torch.uint8)


NAME = "model.layers.0.mlp.up_proj"
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor], str], object], str]] = {
    "no state": (lambda t, n: t.pop(f"{n}.weight.{STATE}"), "lacks a tensor"),
    "no JSON": (lambda t, n: t[f"{n}.weight.{STATE}"].fill_(91), "as a JSON object"),
    "long JSON": (
        lambda t, n: t.update({f"{n}.weight.{STATE}": torch.zeros(5000).byte()}),
        "up to 4096 bytes",
    ),
    "other shape": (
        lambda t, n: t.update({f"{n}.weight": t[f"{n}.weight"][1:].clone()}),
        "fill their matrix",
    ),
    "few scales": (
        lambda t, n: t.update({f"{n}.weight.absmax": t[f"{n}.weight.absmax"][1:].clone()}),
        "as its format has it",
    ),
    "no table": (lambda t, n: t.pop(f"{n}.weight.nested_quant_map"), "lacks a tensor"),
    "huge blocks": (
        lambda t, n: t.update({f"{n}.weight.{STATE}": state_of(shape=[128, 64], blocksize=2**40)}),
        "blocksize must be a whole number",
    ),
    "no offset": (
        lambda t, n: t.update({f"{n}.weight.{STATE}": state_of(shape=[128, 64], nested_offset="1")}),
        "must have an offset",
    ),
    "no shape": (lambda t, n: t.update({f"{n}.weight.{STATE}": state_of(shape=[-1, 64])}), "matrix's shape"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_folder_is_refused(folders: Path, tmp_path: Path, damage: str) -> None:
    change, message = BROKEN[damage]
    raw = damaged(folders / "llama-fp4_dq", tmp_path / "out", change, NAME)
    with pytest.raises(CheckpointError, match=message):
        decoder.decode(raw, NAME)

"""A scheme on a model: what is swapped, what stays and why, and nothing left behind."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from probes.attention import attention_sites
from probes.errors import ProbeError
from probes.hooks import watch
from probes.sites import decoder_layers
from quantlab.config import CheckpointConfig, QuantizeConfig
from quantlab.errors import SchemeError
from quantlab.layers.fake_quant import FakeQuant
from quantlab.layers.linear import QuantLinear
from quantlab.models.loading import load_checkpoint
from quantlab.numerics.affine import QuantizedTensor
from quantlab.quantize import Changes, prepared, quantize_, quantized
from quantlab.schemes import Scheme
from tests.quantlab.whole_models import ids, modules_of, run
from tests.toys import save_checkpoint, toy_model

LINEARS = {"llama": 14, "gpt2": 8, "gpt_neox": 8, "diffllama": 14}
SCHEMES = (
    "w8",
    "w4g32z",
    "w8a8",
    "w4a8t",
    "a8",
    "w8za8z",
    "w4g32a8",
    "l8t",
    "l4h",
    "l6r",
    "p8t",
    "w4g32a8l6t",
    "x8",
    "x4t",
    "w8a8x6",
)


@pytest.mark.parametrize("family", LINEARS)
def test_every_scheme_runs_and_leaves_the_model_as_it_was(family: str) -> None:
    model = toy_model(family, gain=3.0)
    before, modules, keys = run(model, ids()), modules_of(model), list(model.state_dict())
    alive = []
    for name in SCHEMES:
        scheme = Scheme.parse(name)
        with quantized(model, scheme) as changes:
            after = run(model, ids())
            alive += [weakref.ref(m) for m in model.modules() if isinstance(m, QuantLinear | FakeQuant)]
        assert after.isfinite().all() and not torch.equal(after, before)
        assert modules_of(model) == modules and list(model.state_dict()) == keys
        linears = [row for row in changes.rows if row.action == "swapped" and row.num_weights]
        assert len(linears) == (LINEARS[family] if scheme.weights or scheme.activations else 0)
        assert sum(changes.share_by_bits.values()) == pytest.approx(1.0, abs=1e-12)
        assert changes.share_by_bits == {scheme.weights.bits if scheme.weights else 16: 1.0}
        json.dumps(changes.summary(), allow_nan=False)
    assert torch.equal(run(model, ids()), before)
    gc.collect()
    assert not [ref for ref in alive if ref() is not None], "copies of earlier schemes are gone"


def test_the_baseline_changes_nothing() -> None:
    model = toy_model("llama")
    before = run(model, ids())
    with quantized(model, Scheme.parse("w16")) as changes:
        assert torch.equal(run(model, ids()), before)
    assert changes.rows == () and changes.share_by_bits == {16: 1.0} and changes.average_storage_bits == 16.0
    assert changes.weights_bytes == 2 * sum(p.numel() for p in model.parameters())
    with pytest.raises(SchemeError, match=r"'\*.upproj' matches none"):
        quantize_(model, Scheme.parse("w16"), QuantizeConfig(skip=("*.upproj",)))


@pytest.mark.parametrize("name", ["w8a8", "l4t", "w4g32a8l6t"])
def test_an_exception_restores_the_model_too(name: str) -> None:
    model = toy_model("llama")
    before, modules = run(model, ids()), modules_of(model)
    with pytest.raises(KeyError, match="stop"), quantized(model, Scheme.parse(name)):
        raise KeyError("stop")
    assert modules_of(model) == modules and torch.equal(run(model, ids()), before)


def test_swapping_for_good() -> None:
    model = toy_model("gpt2")
    changes = quantize_(model, Scheme.parse("w8a8"))
    assert isinstance(model.transformer.h[0].attn.c_attn, QuantLinear)
    assert not any(isinstance(module, FakeQuant) for module in model.modules())
    assert changes.summary()["kernels"] == {"int8_mm": 8}
    with pytest.raises(SchemeError, match="one scheme at a time"):
        quantize_(model, Scheme.parse("w4"))


@pytest.mark.parametrize("variant", ["diff_v1", "diff_v2"])
@pytest.mark.parametrize("name", ["w4g32", "w8a8", "l4t", "p4r", "e4h", "x4", "w8a8l8tp8te8tx8"])
def test_every_scheme_changes_differential_models_and_leaves_them_as_they_were(
    variant: str, name: str
) -> None:
    model = toy_model("quantlab", gain=3.0, variant=variant)
    before, modules = run(model, ids()), modules_of(model)
    with quantized(model, Scheme.parse(name)) as changes:
        assert not torch.equal(run(model, ids()), before)
        swapped = {row.name.rpartition(".")[2] for row in changes.rows if row.action == "swapped"}
    assert ("lambda_proj" in swapped) == (variant == "diff_v2" and "w" in name)
    assert ("attn_effective" in swapped) == ("e" in name)
    assert torch.equal(run(model, ids()), before)
    assert modules_of(model) == modules


def test_lambda_is_rounded_where_it_is_of_each_token() -> None:
    model = toy_model("quantlab", gain=3.0, variant="diff_v2")
    before, seen = run(model, ids()), []
    with quantized(model, Scheme.parse("d4")) as changes:
        assert [row.name for row in changes.rows if row.action == "swapped"] == [
            f"model.layers.{index}.self_attn.lambda_" for index in (0, 1)
        ]
        with watch(model, "*.self_attn.lambda_", lambda _, __, ___, out: seen.append(out)):
            assert not torch.equal(run(model, ids()), before)
    for lambda_BTH in seen:
        # Never negative, so 4 bits count from 0 to 15.
        codes = lambda_BTH / lambda_BTH.amax(-1, keepdim=True) * 15
        assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert torch.equal(run(model, ids()), before)


@pytest.mark.parametrize("changes", [{}, {"variant": "diff_v1"}])
def test_lambda_needs_attention_that_makes_one_for_each_token(changes: dict[str, str]) -> None:
    with (
        pytest.raises(SchemeError, match="its attention has no lambda, or one a layer"),
        quantized(toy_model("quantlab", **changes), Scheme.parse("d8")),
    ):
        pass


def test_layers_that_are_integrated_have_no_output_of_their_own() -> None:
    with (
        pytest.raises(SchemeError, match="are integrated over depth"),
        quantized(toy_model("quantlab", variant="continuous_depth"), Scheme.parse("x8")),
    ):
        pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "quantlab"])
def test_outputs_of_layers_lie_on_the_grid(family: str) -> None:
    model, seen = toy_model(family, gain=3.0), []
    names = [name for name, _ in decoder_layers(model)]
    with quantized(model, Scheme.parse("x4")), watch(model, names, lambda _, __, ___, out: seen.append(out)):
        run(model, ids())
    assert len(seen) == 2
    for output in seen:
        hidden = output[0] if isinstance(output, tuple) else output
        codes = hidden / hidden.abs().amax(-1, keepdim=True) * 7
        assert torch.allclose(codes, codes.round(), atol=1e-3)


def test_effective_maps_need_a_layer_that_joins_maps() -> None:
    for model in (toy_model("llama"), toy_model("quantlab")):
        with (
            pytest.raises(SchemeError, match="exist where attention joins its maps"),
            quantized(model, Scheme.parse("e8t")),
        ):
            pass


def test_the_block_size_does_not_change_a_scale_of_effective_maps() -> None:
    model, outputs = toy_model("quantlab", gain=3.0, variant="diff_v1"), []
    for size in (16, 32, 64):
        with attention_sites(model, block_size=size), quantized(model, Scheme.parse("l6te4t")):
            outputs.append(run(model, ids(length=80)))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_sites_need_their_block() -> None:
    model = toy_model("llama")
    with pytest.raises(SchemeError, match="l8t quantizes attention sites, which live inside attention_sites"):
        quantize_(model, Scheme.parse("l8t"))
    with attention_sites(model):
        quantize_(model, Scheme.parse("l4t"))
        one = run(model, ids())
    with quantized(model, Scheme.parse("l4t")):
        assert torch.equal(run(model, ids()), one)
    with attention_sites(model), quantized(model, Scheme.parse("l4t")):
        assert torch.equal(run(model, ids()), one)


def test_architectures_without_sites_are_refused() -> None:
    model = toy_model("gptj")
    with pytest.raises(ProbeError, match="AttentionInterface"), quantized(model, Scheme.parse("l8t")):
        run(model, ids())
    with quantized(model, Scheme.parse("w8a8")):
        run(model, ids())


def typical(difference: Tensor) -> float:
    """The median magnitude: what most values do, whatever a few flipped codes do to theirs."""
    return float(difference.abs().median())


@pytest.mark.parametrize("family", ["llama", "gpt2", "diffllama"])
@pytest.mark.parametrize("name", ["w8a8", "w4a8t", "w8za8z", "w6a6"])
def test_integers_and_floats_agree_on_a_model(family: str, name: str) -> None:
    """The products agree within rounding, so a code flips only where a value lies within rounding of a boundary.

    A flip is one step, which is what quantization does to every value: so it moves an output by no more than the
    scheme's own effect, both ways, and most outputs not at all.
    """
    model, scheme = toy_model(family, gain=3.0), Scheme.parse(name)
    before = run(model, ids())
    with quantized(model, scheme) as changes:
        real = run(model, ids())
    with quantized(model, scheme, QuantizeConfig(kernel="simulated")) as reference:
        fake = run(model, ids())
    assert set(changes.summary()["kernels"]) == {"int8_mm"}
    assert set(reference.summary()["kernels"]) == {"simulated"}
    assert (real - fake).abs().max() <= 2 * (fake - before).abs().max()
    assert typical(real - fake) <= 0.1 * typical(fake - before)


@pytest.mark.parametrize("name", ["w8a8", "a8t", "w4a8t", "a4c", "l4t", "l4h", "l4r", "p4t", "w8a8l6t"])
@pytest.mark.parametrize("family", ["llama", "diffllama"])
def test_what_else_is_in_the_batch_does_not_matter(family: str, name: str) -> None:
    """Sequences alone and beside others: the same, but for what rounding of float sums may flip on some machine.

    A scale over the batch would move most values by the whole effect of the scheme.
    """
    model, scheme = toy_model(family, gain=3.0), Scheme.parse(name)
    with torch.no_grad():
        # One token whose embedding is far larger than all others, in one sequence only.
        model.get_input_embeddings().weight[7] *= 30
    tokens = ids(4, 20).masked_fill(ids(4, 20) == 7, 8)
    tokens[2, 5] = 7
    before = run(model, tokens)
    with quantized(model, scheme):
        together = run(model, tokens)
        for i in range(4):
            alone = run(model, tokens[i : i + 1])[0]
            assert typical(alone - together[i]) <= 0.1 * typical(together[i] - before[i])


def test_changes_are_data() -> None:
    with quantized(toy_model("llama"), Scheme.parse("w8a8l8")) as changes:
        pass
    assert isinstance(changes, Changes)
    summary = changes.summary()
    assert summary["scheme"] == "w8a8l8t" and summary["share_by_bits"] == {"8": 1.0}
    assert (summary["num_swapped"], summary["num_skipped"]) == (16, 2)
    assert summary["kernels"] == {"int8_mm": 14, "simulated": 2}


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_scales_are_those_of_a_folder_of_the_checkpoint_unless_asked_otherwise(
    tmp_path: Path, stored: str
) -> None:
    """Whoever asks; what the source stored decides, and not only the dtype that it was loaded in."""
    folder = save_checkpoint("llama", tmp_path, dtype=stored)
    model = load_checkpoint(CheckpointConfig(path=str(folder), dtype="float32", device="cpu")).model
    unloaded = toy_model("llama").to(getattr(torch, stored))

    def precision(of: torch.nn.Module, **options: torch.dtype | str) -> str:
        asked = QuantizeConfig(**{k: v for k, v in options.items() if isinstance(v, str)})  # type: ignore[arg-type]
        fixed = {k: v for k, v in options.items() if isinstance(v, torch.dtype)}
        with prepared(of, Scheme.parse("w4g32"), asked, **fixed) as ready:  # type: ignore[arg-type]
            solved = [ready.solve(name).quantized for name in ready.linears]
        assert all(isinstance(each, QuantizedTensor) for each in solved)
        scales = torch.cat([each.scale.flatten() for each in solved])  # type: ignore[union-attr]
        fits = [
            name
            for name in ("bfloat16", "float16")
            if torch.equal(scales, scales.to(getattr(torch, name)).float())
        ]
        return fits[0] if fits else "float32"

    assert precision(model) == precision(unloaded) == stored
    for name in ("float32", "bfloat16", "float16"):
        assert precision(model, scale_dtype=name) == name
        assert precision(model, scale_dtype=getattr(torch, name)) == name

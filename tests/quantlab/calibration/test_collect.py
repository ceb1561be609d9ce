"""What calibration sums is what a plain forward shows."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlab.calibration import accumulators, collect, watcher
from quantlab.calibration.cache import calibrated
from quantlab.calibration.check import check_text_of
from quantlab.calibration.collect import calibrate
from quantlab.calibration.statistics import Calibration
from quantlab.errors import CalibrationError
from quantlab.layers.targets import find_targets
from tests import toys
from tests.quantlab.calibration.toy_calibrations import ids


def _inputs(model: nn.Module, ids_NT: torch.Tensor) -> dict[str, torch.Tensor]:
    """All inputs of every decoder linear in an ordinary forward, [M, I] in float64."""
    names = [target.name for target in find_targets(model) if target.sort == "linear"]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].detach().double().flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


ROUNDING = (2 * 8 * 128 + 60) * 2.0**-24
"""Of X^T X against the norms of its channels: a toy's forward is 8 sums of up to 128 products in a row, each off by one
rounding a product at most, on either side of X^T X; its own sums are of 60 tokens."""


def assert_same_sums(gram_II: torch.Tensor, expected_II: torch.Tensor) -> None:
    """Of two channels, within rounding of the product of their norms, which no sum of their products can pass."""
    expected_II, norms_I = expected_II.double(), expected_II.double().diagonal().sqrt()
    excess = (gram_II.double() - expected_II).abs() - ROUNDING * norms_I[:, None] * norms_I
    assert (excess <= 0).all(), f"worst excess {excess.max():.3e}"


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_statistics_are_those_of_an_ordinary_forward(family: str) -> None:
    model, ids_NT = toys.toy_model(family), ids(5)
    found = calibrate(model, ids_NT, batch_size=2)
    expected = _inputs(model, ids_NT)
    assert found.linears.keys() == expected.keys()
    for name, x_MI in expected.items():
        stats = found.linears[name]
        assert stats.num_tokens == len(x_MI) == 60
        assert stats.gram_II.dtype == stats.absmax_I.dtype == torch.float32
        size = float(x_MI.abs().max())
        assert_same_sums(stats.gram_II, x_MI.T @ x_MI)
        torch.testing.assert_close(stats.mean_I.double(), x_MI.mean(0), rtol=1e-4, atol=1e-5 * size)
        torch.testing.assert_close(stats.minimum_I.double(), x_MI.amin(0), rtol=1e-4, atol=1e-5 * size)
        torch.testing.assert_close(stats.maximum_I.double(), x_MI.amax(0), rtol=1e-4, atol=1e-5 * size)
        assert torch.equal(stats.gram_II, stats.gram_II.T)


def test_wide_inputs_are_summed_block_by_block() -> None:
    """More channels than a block of X^T X has rows."""
    model, ids_NT = toys.toy_model(intermediate_size=600), ids()
    name = "model.layers.1.mlp.down_proj"
    x_MI = _inputs(model, ids_NT)[name]
    gram_II = calibrate(model, ids_NT).linears[name].gram_II
    assert_same_sums(gram_II, x_MI.T @ x_MI)
    assert torch.equal(gram_II, gram_II.T)


def test_linears_that_read_one_tensor_share_one_gram() -> None:
    linears = calibrate(toys.toy_model(), ids(), batch_size=1).linears
    grams: dict[int, list[str]] = {}
    for name, stats in linears.items():
        grams.setdefault(id(stats.gram_II), []).append(name.removeprefix("model.layers."))
    own = [["mlp.down_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["self_attn.o_proj"]]
    one_layer = [*own, [f"self_attn.{each}_proj" for each in "qkv"]]
    assert sorted(grams.values()) == [
        [f"{layer}.{each}" for each in group] for layer in (0, 1) for group in one_layer
    ]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "phi3", "quantlab"])
def test_attention_ranges_are_of_what_enters_the_product(family: str) -> None:
    model, ids_NT = toys.toy_model(family), ids()
    heads = toys.FAMILIES[family].get("num_key_value_heads", 4)
    found = calibrate(model, ids_NT).attention
    assert len(found) == 2
    for stats in found.values():
        assert stats.query.minimum_HC.shape == (4, 16)
        assert stats.key.maximum_HC.shape == stats.value.maximum_HC.shape == (heads, 16)
        assert (stats.query.minimum_HC < stats.query.maximum_HC).all()


def test_value_ranges_are_those_of_v_proj() -> None:
    model, ids_NT = toys.toy_model(), ids()
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].self_attn.v_proj.register_forward_hook(
        lambda *call: seen.append(call[2].detach())
    )
    with torch.no_grad():
        model(ids_NT)
    handle.remove()
    value = calibrate(model, ids_NT).attention["model.layers.1.self_attn"].value
    size = float(seen[0].abs().max())
    torch.testing.assert_close(value.minimum_HC.flatten(), seen[0].amin((0, 1)), rtol=0, atol=1e-4 * size)
    torch.testing.assert_close(value.maximum_HC.flatten(), seen[0].amax((0, 1)), rtol=0, atol=1e-4 * size)


def test_ranges_keep_their_signs_over_all_calls() -> None:
    sums = accumulators.RangeSums("site")
    sums.add(torch.tensor([[-3.0, 2.0], [-2.0, 5.0]]).reshape(1, 1, 2, 2))
    sums.add(torch.tensor([[-4.0, 3.0], [-5.0, 4.0]]).reshape(2, 1, 1, 2))
    ranges = sums.result()
    assert ranges.minimum_HC.tolist() == [[-5.0, 2.0]] and ranges.maximum_HC.tolist() == [[-2.0, 5.0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ranges_of_what_is_not_finite_are_refused(value: float) -> None:
    with pytest.raises(
        CalibrationError, match=r"activations must be finite: layer\.attn_key holds NaN or Inf"
    ):
        accumulators.RangeSums("layer.attn_key").add(torch.full((1, 1, 2, 2), value))


@pytest.mark.parametrize("family", ["bloom", "gptj"])
def test_attention_without_sites_is_left_empty(family: str) -> None:
    found = calibrate(toys.toy_model(family), ids())
    assert not found.attention and found.linears


def test_batches_change_nothing_but_rounding() -> None:
    one, all_ = (calibrate(toys.toy_model(), ids(), batch_size=size).linears for size in (1, 4))
    for name in one:
        assert_same_sums(one[name].gram_II, all_[name].gram_II)


def test_bfloat16_activations_are_summed_in_float32() -> None:
    model, ids_NT = toys.toy_model().bfloat16(), ids()
    name = "model.layers.0.self_attn.q_proj"
    x_MI = _inputs(model, ids_NT)[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        stats = calibrate(model, ids_NT).linears[name]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(stats.gram_II.double(), x_MI.T @ x_MI, rtol=1e-5, atol=1e-5)


def test_float64_on_demand() -> None:
    stats = calibrate(toys.toy_model(), ids(), accumulate=torch.float64).linears[
        "model.layers.0.mlp.down_proj"
    ]
    assert stats.gram_II.dtype == torch.float64 and stats.mean_I.dtype == torch.float32


def test_constant_and_dead_channels_are_counted_as_they_are() -> None:
    model, ids_NT = toys.toy_model(), ids()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = 0
    stats = calibrate(model, ids_NT).linears["model.layers.0.mlp.up_proj"]
    assert stats.absmax_I[3] == 0 and (stats.gram_II[3] == 0).all()
    constant = _replaced(model, "model.layers.0.mlp.down_proj", lambda x: torch.full_like(x, 2.0))
    stats = calibrate(constant, ids_NT).linears["model.layers.0.mlp.down_proj"]
    assert (stats.minimum_I == 2).all() and (stats.mean_I == 2).all() and (stats.gram_II == 4 * 48).all()


def test_fewer_tokens_than_in_features_is_no_error() -> None:
    stats = calibrate(toys.toy_model(), ids(1, 4)).linears["model.layers.0.mlp.down_proj"]
    assert stats.num_tokens == 4 and int(torch.linalg.matrix_rank(stats.gram_II)) <= 4


def test_a_linear_that_no_token_reaches_says_so() -> None:
    model = toys.toy_model()
    model.model.layers[1].mlp.spare = nn.Linear(7, 3)
    stats = calibrate(model, ids()).linears["model.layers.1.mlp.spare"]
    assert stats.num_tokens == 0 and stats.gram_II.shape == (7, 7) and not stats.absmax_I.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = toys.toy_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(
        CalibrationError,
        match=r"weights must be finite.*model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN or Inf",
    ):
        calibrate(model, ids())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_activation_that_is_not_finite_is_named(value: float) -> None:
    model = _replaced(toys.toy_model(), "model.layers.1.mlp.down_proj", lambda x: x + value)
    with pytest.raises(
        CalibrationError, match=r"activations must be finite: the input of model\.layers\.1\.mlp\.down_proj"
    ):
        calibrate(model, ids())


def test_embeddings_that_are_not_finite_are_named() -> None:
    model = toys.toy_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(CalibrationError, match=r"activations must be finite.*the output of the embeddings"):
        calibrate(model, ids())


def test_outliers_whose_squares_overflow_are_an_error_in_float32_and_fine_in_float64() -> None:
    model = _replaced(toys.toy_model(), "model.layers.0.self_attn.o_proj", lambda x: x * 0 + 1e38)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    with pytest.raises(
        CalibrationError,
        match=r"inputs of model\.layers\.0\.self_attn\.o_proj reach 1e\+38, whose squares overflow float32\. Set "
        r"calibration\.accumulate=float64",
    ):
        calibrate(model, ids())
    stats = calibrate(model, ids(), accumulate=torch.float64).linears["model.layers.0.self_attn.o_proj"]
    torch.testing.assert_close(
        stats.gram_II, torch.full_like(stats.gram_II, 48e76), rtol=1e-6, atol=0
    )  # 48 tokens; 1e38 itself is rounded to float32
    assert torch.isfinite(stats.mean_I).all()


def test_advance_counts_each_sequence_once_a_layer() -> None:
    counts: list[int] = []
    calibrate(toys.toy_model(), ids(5), batch_size=2, advance=counts.append)
    assert counts == [2, 2, 1] * 2


def test_in_memory_results_have_no_key() -> None:
    ids_NT = ids()
    found = calibrate(toys.toy_model(), ids_NT)
    assert isinstance(found, Calibration) and found.key == "" and found.ids_NT is ids_NT


def _replaced(model: nn.Module, name: str, change: Any) -> nn.Module:
    """The model with the output of whatever comes before a linear changed."""
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: (change(args[0]),))
    return model


@pytest.mark.parametrize("check", [False, True])
def test_nothing_of_a_layer_is_left_when_the_next_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: bool
) -> None:
    """Peak memory is that of one layer; and sums are made once for each distinct input, whatever the batches."""
    grams: list[weakref.ref[torch.Tensor]] = []
    kept: list[int] = []
    plain, model = accumulators.InputSums, toys.toy_model()

    def counted(*args: Any) -> accumulators.InputSums:
        found = plain(*args)
        grams.append(weakref.ref(found.gram_II))
        return found

    monkeypatch.setattr(watcher, "InputSums", counted)
    monkeypatch.setattr(
        collect, "check_weights", lambda step: kept.append(sum(gram() is not None for gram in grams))
    )
    if check:
        monkeypatch.setattr("quantlab.calibration.check.overlaps", lambda texts: {})
        check_text_of(model, ids(), toys.toy_tokenizer(), batch_size=1)
    else:
        calibrated(model, ids(), folder=tmp_path, checkpoint="abc", batch_size=1)
    assert len(grams) == (16 if check else 8)
    assert kept == [0, 0]


def test_calibration_works_in_inference_mode() -> None:
    expected = calibrate(toys.toy_model(), ids()).linears
    with torch.inference_mode():
        found = calibrate(toys.toy_model(), ids()).linears
    for name, stats in expected.items():
        assert torch.equal(found[name].gram_II, stats.gram_II)


def test_only_layers_whose_attention_reaches_its_sites_have_ranges() -> None:
    """The first layer of some architectures has no softmax attention, or a later one goes its own way."""
    for layer, left in ((0, ["model.layers.1.self_attn"]), (1, ["model.layers.0.self_attn"])):
        model = toys.toy_model()
        model.model.layers[layer].self_attn = _Mixer()
        assert list(calibrate(model, ids()).attention) == left
    model = toys.toy_model()
    inner = model.model.layers[1].self_attn
    inner.forward = lambda hidden_states, **_: (inner.o_proj(hidden_states), None)
    found = calibrate(model, ids())
    assert list(found.attention) == ["model.layers.0.self_attn"]
    assert found.linears["model.layers.1.self_attn.q_proj"].num_tokens == 0


class _Mixer(nn.Module):
    """Stands for attention without a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 64)

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return self.mix(hidden_states), None

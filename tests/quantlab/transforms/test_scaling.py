"""Fold, smooth and scale: the same function on every declared architecture, and what each does to the weights."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantlab.errors import SchemeError
from quantlab.transforms.edges import Edge, find_edges
from quantlab.transforms.edit import Undo, locate, matrix_of, restore
from quantlab.transforms.fold import fold_
from quantlab.transforms.guard import Guard
from quantlab.transforms.scaling import scale_, tied
from quantlab.transforms.smooth import smooth_, smoothing_scales
from tests.quantlab.transforms.models import CASES, assert_near_rounding, random_model, statistics, tokens


def random_scales(edge: Edge, seed: int = 3) -> Tensor:
    """Positive scales around 1, equal where channels share a source, [I]."""
    scales = torch.exp(torch.randn(edge.num_sources, generator=torch.Generator().manual_seed(seed)))
    return scales[list(edge.source_of)]


def scale_everything(model: PreTrainedModel, undo: Undo) -> list[str]:
    for edge in find_edges(model):
        if edge.kind != "head_norm" or locate(model, edge.source)[0].weight is not None:
            scale_(model, edge, random_scales(edge), undo)
    return []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_function_stays_and_comes_back(case: str, dtype: torch.dtype) -> None:
    """Each transform passes the guard; undone, the model has the same objects and bits."""
    model, ids = random_model(case, dtype), tokens(2)
    stats = statistics(model, ids)
    modules, state = dict(model.named_modules()), {key: x.clone() for key, x in model.state_dict().items()}
    guard = Guard(model, ids)
    for name, change in {
        "fold": lambda undo: fold_(model, undo),
        "smooth": lambda undo: smooth_(model, stats, undo),
        "scale": lambda undo: scale_everything(model, undo),
    }.items():
        undo: Undo = []
        guard.apply(name, change, undo)
        assert undo, name
        assert_near_rounding(guard)
        restore(undo)
        now = dict(model.named_modules())
        assert now.keys() == modules.keys() and all(now[key] is modules[key] for key in modules)
        assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2", "diff_v1", "continuous_depth"])
def test_fold_leaves_norms_that_treat_channels_alike(case: str) -> None:
    model, undo = random_model(case), Undo()
    fold_(model, undo)
    for edge in find_edges(model, ("norm", "head_norm")):
        norm, _ = locate(model, edge.source)
        assert torch.equal(norm.weight + edge.offset, torch.ones_like(norm.weight))
        assert not getattr(norm, "bias", None) is not None or not norm.bias.any()


def test_fold_gives_a_bias_to_a_linear_without_one() -> None:
    model, undo = random_model("opt enable_bias=False"), Undo()
    assert model.model.decoder.layers[0].fc1.bias is None
    fold_(model, undo)
    assert model.model.decoder.layers[0].fc1.bias.abs().min() > 0
    restore(undo)
    assert model.model.decoder.layers[0].fc1.bias is None


def test_fold_refuses_a_gain_of_zero_behind_which_something_is_added() -> None:
    model = random_model("continuous_depth")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
    with pytest.raises(
        SchemeError, match=r"a gain of 0 cannot be folded past .*attention_condition.shift adds"
    ):
        fold_(model, [])


def test_scaling_divides_what_readers_see() -> None:
    """Inputs of each reader are those of before over the scale, and its outputs are the same."""
    model, ids, undo = random_model("llama"), tokens(2), Undo()
    edges = [edge for edge in find_edges(model) if edge.source.startswith("model.layers.0")]
    before = statistics(model, ids)
    for edge in edges:
        scale_(model, edge, random_scales(edge), undo)
    after = statistics(model, ids)
    assert {edge.kind for edge in edges} == {"norm", "link", "values"}
    for edge in edges:
        for name in edge.readers:
            torch.testing.assert_close(after[name].absmax_I * random_scales(edge), before[name].absmax_I)


def test_scales_of_channels_that_share_a_value_must_agree() -> None:
    model = random_model("llama")  # 4 output heads on 2 value heads
    edge = next(edge for edge in find_edges(model, ("values",)))
    scales = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    with pytest.raises(
        SchemeError, match=r"channels that read one channel of model.layers.0.self_attn.v_proj"
    ):
        scale_(model, edge, scales, [])
    scales_S = tied(edge, scales)
    torch.testing.assert_close(scales_S[:16], (scales[:16] * scales[16:32]).sqrt().double())
    scale_(model, edge, scales_S[list(edge.source_of)], [])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_must_be_positive_numbers(bad: float) -> None:
    model = random_model("llama")
    edge = find_edges(model)[0]
    scales = torch.ones(64)
    scales[5] = bad
    with pytest.raises(SchemeError, match="scales must be finite and above 0"):
        scale_(model, edge, scales, [])
    with pytest.raises(SchemeError, match=r"takes 64 scales: found \[63\]"):
        scale_(model, edge, torch.ones(63), [])


def test_smoothing_follows_the_formula() -> None:
    """s = max|X|^a / max|W|^(1 - a), and afterwards both sides' maxima have the ratio that alpha says."""
    model, ids, undo = random_model("llama"), tokens(2), Undo()
    stats, name = statistics(model, ids), "model.layers.0.mlp.up_proj"
    edge = next(edge for edge in find_edges(model, ("norm",)) if name in edge.readers)
    weights = torch.cat([matrix_of(locate(model, reader)[0]) for reader in edge.readers]).abs().amax(0)
    expected = stats[name].absmax_I.double() ** 0.7 / weights**0.3
    torch.testing.assert_close(smoothing_scales(model, edge, stats, 0.7), expected)
    smooth_(model, stats, undo, alpha=0.5)
    after = torch.cat([matrix_of(locate(model, reader)[0]) for reader in edge.readers]).abs().amax(0)
    # at one half, weights and activations of each channel become equally large
    torch.testing.assert_close(after.float(), statistics(model, ids)[name].absmax_I, rtol=1e-4, atol=0)


def test_dead_channels_keep_their_scale() -> None:
    model = random_model("llama")
    stats = dict(statistics(model, tokens(2)))
    edge = find_edges(model, ("norm",))[0]
    for name in edge.readers:
        stats[name].minimum_I[7] = stats[name].maximum_I[7] = 0.0
    with torch.no_grad():
        for name in edge.readers:
            locate(model, name)[0].weight[:, 9] = 0.0
    scales = smoothing_scales(model, edge, stats, 0.5)
    assert scales[[7, 9]].tolist() == [1.0, 1.0]
    assert (scales != 1).sum() == 62


def test_smooth_refuses_what_it_cannot_use() -> None:
    model = random_model("llama")
    stats = dict(statistics(model, tokens(2)))
    with pytest.raises(SchemeError, match=r"alpha of smooth must lie between 0 and 1: found 1.5"):
        smooth_(model, stats, [], alpha=1.5)
    with pytest.raises(SchemeError, match=r"reads model.layers.0.input_layernorm: there are none of"):
        smooth_(model, {}, [])
    first = stats["model.layers.0.self_attn.q_proj"]
    first.maximum_I[0] = torch.inf
    with pytest.raises(
        SchemeError, match=r"must be finite: inputs of model.layers.0.self_attn.q_proj are not"
    ):
        smooth_(model, stats, [])

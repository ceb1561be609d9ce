"""Rotations: orthogonal to the last digit, the same function on every variant, refused where nothing is declared."""

import pytest
import torch

from probes.attention import attention_sites
from quantlab.errors import SchemeError
from quantlab.layers.rotated import HadamardTransform, HeadHadamard, RotatedLinear
from quantlab.transforms import rotate
from quantlab.transforms.apply import transformed
from quantlab.transforms.edges import graph_for, layer_names, value_heads
from quantlab.transforms.edit import Undo, matrix_of, restore
from quantlab.transforms.guard import Guard, difference, logits_of
from quantlab.transforms.hadamard import (
    apply_factors,
    dense,
    factors_of,
    hadamard_order,
    random_orthogonal,
    random_rotation,
)
from tests.quantlab.transforms.models import CASES, assert_near_rounding, random_model, statistics, tokens

SIZES = [1, 2, 3, 8, 12, 20, 28, 43, 64, 96, 172, 576, 896, 1536]


@pytest.mark.parametrize("size", SIZES)
def test_factors_are_orthogonal_and_multiply_to_the_size(size: int) -> None:
    factors = factors_of(size)
    matrix = dense(factors)
    assert matrix.shape == (size, size)
    # The magnitudes of n products of two unit rows sum to at most 1, so their sum is off by n u, in whatever order. An
    # entry is 3 roundings of each factor (root, quotient, product), twice in a product. Of a factor that is drawn, QR
    # leaves rows of m numbers that are off from orthogonal by m^2 u (Higham 2002, theorem 19.4).
    drawn = sum(len(factor) ** 2 for factor in factors if hadamard_order(len(factor)) is None)
    bound = (size + 6 * len(factors) + drawn) * 2.0**-53
    assert (matrix @ matrix.T - torch.eye(size)).abs().max() <= bound
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(apply_factors(x, factors), x @ matrix)


@pytest.mark.parametrize(
    ("size", "order"), [(64, 1), (576, 36), (1536, 12), (896, 28), (43, None), (11008, None)]
)
def test_hadamard_sizes(size: int, order: int | None) -> None:
    assert hadamard_order(size) == order
    if order is not None and size < 1000:
        entries = dense(factors_of(size)) * size**0.5
        torch.testing.assert_close(entries.abs(), torch.ones_like(entries))


def test_rotations_are_drawn_from_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, same, other = (random_rotation(43, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.matrix, same.matrix)
    assert not torch.equal(first.matrix, other.matrix)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = torch.randn(5, 43, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(first(x), x @ first.matrix)
    q = random_orthogonal(5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(q @ q.T, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_each_rotation_keeps_the_function_and_comes_back(case: str, dtype: torch.dtype) -> None:
    model, ids = random_model(case, dtype), tokens(2)
    modules, state = dict(model.named_modules()), {key: x.clone() for key, x in model.state_dict().items()}
    guard, tied = Guard(model, ids), model.config.tie_word_embeddings
    parts = rotate.declared_parts(model)
    for chosen in [(part,) for part in parts] + [parts]:
        undo: Undo = []
        guard.apply("rotate", lambda undo, chosen=chosen: rotate.rotate_(model, undo, parts=chosen), undo)
        assert undo
        assert_near_rounding(guard)
        restore(undo)
    now = dict(model.named_modules())
    assert now.keys() == modules.keys() and all(now[key] is modules[key] for key in modules)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
    assert model.config.tie_word_embeddings == tied


def test_which_parts_are_declared() -> None:
    declared = {case: rotate.declared_parts(random_model(case)) for case in CASES}
    without = {case.split()[0] for case, parts in declared.items() if "residual" not in parts}
    layer_norms = {"gpt2", "gpt_neox", "opt", "gptj", "gpt_neo", "bloom", "mpt", "falcon"}
    assert without == layer_norms | {"gemma2", "gemma3_text", "continuous_depth"}
    assert "residual" in declared["continuous_depth conditioned=False"]
    for part in ("values", "heads"):
        assert {case for case, parts in declared.items() if part not in parts} == {"mpt", "falcon"}
    assert all("down" in parts for parts in declared.values())


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("gemma2", "norms with gains stand between"),
        ("gpt2", "LayerNorm subtracts a mean"),
        ("continuous_depth", "by depth"),
    ],
)
def test_a_part_that_is_not_declared_is_refused(case: str, why: str) -> None:
    model = random_model(case)
    with (
        pytest.raises(
            SchemeError,
            match=rf"its residual may be rotated, since .*{why}.* rotate values and heads and down alone",
        ),
        transformed(model, ("rotate",), tokens(1), {}),
    ):
        pass
    with pytest.raises(SchemeError, match="parts of rotate are residual, values, heads, down: found 'keys'"):
        rotate.rotate_(model, [], parts=("keys",))


def test_a_gain_of_heads_must_be_folded_before_values_turn() -> None:
    """The negative control: without folding, the guard sees it; with it, the gain is gone and the function stays."""
    model, ids = random_model("diff_v1"), tokens(2)

    def unfolded(undo: Undo) -> list[str]:
        graph = graph_for(model)
        assert graph.values is not None
        for prefix in layer_names(model, graph):
            heads = value_heads(model, graph.values, prefix)
            turn = random_rotation(heads.width, torch.Generator().manual_seed(0)).matrix
            rotate.rotate_heads_(model, heads, turn, undo)
        return []

    with pytest.raises(SchemeError, match="must not change the function"):
        Guard(model, ids).apply("values", unfolded, [])
    undo: Undo = []
    Guard(model, ids).apply("values", lambda undo: rotate.rotate_(model, undo, parts=("values",)), undo)
    assert torch.equal(model.model.layers[0].self_attn.subln.weight, torch.ones(32))


@pytest.mark.parametrize("case", ["llama", "diff_v1", "diff_v2", "diffllama", "gpt2"])
def test_a_head_that_stands_out_is_spread_over_all_heads(case: str) -> None:
    """By the part across heads alone; a rotation within heads leaves it in its head. The output is the same."""
    model = random_model(case)
    graph = graph_for(model)
    assert graph.values is not None
    name = layer_names(model, graph)[0] + graph.values.target
    linear = model.get_submodule(name)
    inputs = matrix_of(linear).shape[1]
    x = torch.zeros(1, inputs)
    x[:, : inputs // 4] = torch.randn(1, inputs // 4, generator=torch.Generator().manual_seed(0))
    before = linear(x)
    rotate.rotate_(model, [], parts=("heads",))
    rotated = model.get_submodule(name)
    assert isinstance(rotated, RotatedLinear)
    torch.testing.assert_close(rotated(x), before, rtol=1e-4, atol=1e-4)
    energy = rotated.before(x).square().view(4, -1).sum(-1) / x.square().sum()
    assert energy.min() > 0.1 and energy.max() < 0.5
    rotate.rotate_(model, [], parts=("heads",))
    assert model.get_submodule(name) is rotated, "once is enough"


@pytest.mark.parametrize("case", ["llama", "diff_v2", "diffllama", "dex heads=0,3"])
def test_values_may_turn_when_heads_have(case: str) -> None:
    """The reader's columns are turned back for it, in float64."""
    model = random_model(case)
    guard, undo = Guard(model, tokens(2)), Undo()
    for parts in (("heads",), ("values",)):
        guard.apply("rotate", lambda undo, parts=parts: rotate.rotate_(model, undo, parts=parts), undo)
    assert_near_rounding(guard)


@pytest.mark.parametrize("case", ["llama", "diff_v1", "continuous_depth conditioned=False"])
def test_the_residual_stream_may_not_turn_with_gains_in_its_norms(case: str) -> None:
    model, turn = random_model(case), random_rotation(64, torch.Generator().manual_seed(0))

    def unfolded(undo: Undo) -> list[str]:
        rotate.rotate_residual_(model, turn, undo)
        return []

    with pytest.raises(SchemeError, match="must not change the function"):
        Guard(model, tokens(2)).apply("residual", unfolded, [])


def test_a_tied_head_is_untied_and_said() -> None:
    model, ids = random_model("llama tie_word_embeddings=True"), tokens(2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with transformed(model, ("rotate",), ids, {}) as notes:
        assert notes == [
            "rotate: lm_head was tied to model.embed_tokens and has its own matrix now: 32768 values more."
        ]
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_rotation_spreads_an_outlier_channel() -> None:
    """One channel 50 times as large as the others: inputs of linears have no such channel afterwards."""
    model, ids = random_model("llama"), tokens(2)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 50
    name = "model.layers.0.self_attn.q_proj"

    def crest() -> float:
        absmax_I = statistics(model, ids)[name].absmax_I
        return float(absmax_I.max() / absmax_I.median())

    assert crest() > 5
    with transformed(model, ("rotate",), ids, {}):
        assert crest() < 2


def test_smoothing_and_rotation_combine() -> None:
    model, ids = random_model("diff_v2"), tokens(2)
    before, stats = logits_of(model, ids), statistics(model, ids)
    with transformed(model, ("smooth", "rotate"), ids, stats):
        assert 0 < difference(before, logits_of(model, ids)).worst < 1e-4
        assert isinstance(model.model.layers[1].mlp.down_proj, RotatedLinear)
    assert torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_rotated_linear_computes_the_same(case: str) -> None:
    model = random_model(case)
    linear = model.model.layers[0].mlp.down_proj if case == "llama" else model.transformer.h[0].mlp.c_proj
    rotated = RotatedLinear(linear)
    x = torch.randn(2, 3, rotated.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotated(x), linear(x), rtol=1e-4, atol=1e-4)
    assert (rotated.bias is None) == (linear.bias is None)
    torch.testing.assert_close(rotated.before(x).norm(dim=-1), x.norm(dim=-1))


def test_a_transform_keeps_the_dtype_and_rounds_once() -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    transform = HadamardTransform(factors_of(96))
    assert transform(x).dtype == torch.bfloat16
    exact = apply_factors(x.double(), factors_of(96))
    # half a step of bfloat16 and the rounding of float32
    assert ((transform(x) - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("case", ["llama", "diff_v1", "diff_v2", "diffllama", "threshold_diff"])
def test_queries_and_keys_turn_together(case: str) -> None:
    model, ids = random_model(case), tokens(2)
    with attention_sites(model):
        guard = Guard(model, ids)
        layers = [module for module in model.modules() if hasattr(module, "attn_query")]
        for layer in layers:
            layer.attn_query = HeadHadamard(layer.head_dim)
        with pytest.raises(SchemeError, match="must not change the function"):
            guard.check("queries alone")
        for layer in layers:
            layer.attn_key = HeadHadamard(layer.head_dim)
        assert guard.check("both").typical > 0


def test_what_stands_behind_a_rotation_of_heads_gets_turned_channels() -> None:
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    both = HeadHadamard(16, then=Doubled())
    torch.testing.assert_close(both(x, "where"), 2 * HeadHadamard(16)(x))


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor, where: str) -> torch.Tensor:
        assert where == "where"
        return 2 * x

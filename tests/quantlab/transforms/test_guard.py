"""The guard: illegal transforms are found, undone and shown; and transforms by name."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from quantlab.errors import SchemeError
from quantlab.inspection.graph import sources_of
from quantlab.transforms.apply import transformed
from quantlab.transforms.bias import correct_bias
from quantlab.transforms.edges import Edge, find_edges, graph_for, layer_names, value_heads
from quantlab.transforms.edit import Undo
from quantlab.transforms.guard import Guard, difference
from quantlab.transforms.scaling import scale_
from tests.quantlab.transforms.models import random_model, statistics, tokens
from tests.quantlab.transforms.test_scaling import random_scales


def scale_values_all_the_same(model: PreTrainedModel, undo: Undo) -> list[str]:
    """AWQ's v_proj -> o_proj scaling, declared or not."""
    graph = graph_for(model)
    assert graph.values is not None
    for prefix in layer_names(model, graph):
        heads = value_heads(model, graph.values, prefix)
        inputs = model.get_submodule(heads.target).in_features
        sources = tuple(sources_of(inputs, len(heads.rows), heads.width))
        edge = Edge("values", heads.source, (heads.target,), sources, heads.rows)
        scale_(model, edge, random_scales(edge), undo)
    return []


def forget_a_reader(model: PreTrainedModel, undo: Undo, forgotten: str) -> list[str]:
    for edge in find_edges(model, ("norm",)):
        readers = tuple(name for name in edge.readers if not name.endswith(forgotten))
        scale_(model, replace(edge, readers=readers), random_scales(edge), undo)
    return []


ILLEGAL: dict[str, tuple[str, Callable[[PreTrainedModel, Undo], list[str]]]] = {
    "v to o through diff_v1's norm": ("diff_v1", scale_values_all_the_same),
    "v to o through a norm without gain": ("diff_v1 subln_affine=False", scale_values_all_the_same),
    "v to o through DiffLlama's norm": ("diffllama", scale_values_all_the_same),
    "v to o through a matrix of dex": ("dex heads=0,3", scale_values_all_the_same),
    "lambda_proj forgotten": ("diff_v2", lambda model, undo: forget_a_reader(model, undo, "lambda_proj")),
    "gate_proj forgotten": ("gated", lambda model, undo: forget_a_reader(model, undo, "attn.gate_proj")),
    "k_proj forgotten": ("llama", lambda model, undo: forget_a_reader(model, undo, "k_proj")),
    "part of k forgotten": ("shared_diff", lambda model, undo: forget_a_reader(model, undo, "k_proj.down")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_transform_is_undone_and_shown(name: str, dtype: torch.dtype) -> None:
    case, change = ILLEGAL[name]
    model, ids = random_model(case, dtype), tokens(2)
    modules, state = dict(model.named_modules()), {key: x.clone() for key, x in model.state_dict().items()}
    undo: Undo = []
    with pytest.raises(
        SchemeError, match=r"must not change the function: .* sequence \d+, position \d+, after tok"
    ):
        Guard(model, ids).apply(name, lambda undo: change(model, undo), undo)
    assert not undo
    assert all(module is modules[key] for key, module in model.named_modules())
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


def test_a_forgotten_encoder_of_positions_is_seen_where_rounding_is_small() -> None:
    """It moves keys by less than a position; in bfloat16 that is less than rounding does."""
    model = random_model("flow flow_encoder=True")
    with pytest.raises(SchemeError, match="must not change the function"):
        Guard(model, tokens(2)).apply("x", lambda undo: forget_a_reader(model, undo, "direction"), [])


def test_the_counterexample_is_the_worst_token() -> None:
    model, ids = random_model("llama"), tokens(2)
    guard = Guard(model, ids)
    after = guard.before_NTV.clone()
    after[1, 5, 77] += 100
    found = difference(guard.before_NTV, after)
    assert found.where == (1, 5)
    assert found.typical == 0
    message = guard._counterexample("broken", after, found, 1e-6)
    before = float(guard.before_NTV[1, 5, 77])
    assert (
        f"sequence 1, position 5, after token {int(ids[1, 5])}: the logit of token 77 was {before:.6g}"
        in message
    )


def test_not_a_number_is_infinitely_far() -> None:
    before = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[0, 1, 2] = torch.nan
    found = difference(before, after)
    assert found.worst == float("inf")
    assert found.where == (0, 1)


def test_the_guard_needs_tokens_and_finite_logits() -> None:
    model = random_model("llama")
    with pytest.raises(SchemeError, match=r"checked on real tokens: found \[0, 4\]"):
        Guard(model, torch.zeros(0, 4, dtype=torch.long))
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(SchemeError, match="logits must be finite before a transform"):
        Guard(model, tokens(1))


@pytest.mark.parametrize("fails", [False, True])
def test_transforms_by_name_are_gone_after_the_block(fails: bool) -> None:
    model, ids = random_model("llama"), tokens(2)
    modules, stats = dict(model.named_modules()), statistics(model, ids)
    first = model.model.layers[0].self_attn.q_proj
    try:
        with transformed(model, ("fold", "smooth"), ids, stats) as notes:
            assert model.model.layers[0].self_attn.q_proj is not first
            assert notes == []
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert all(module is modules[key] for key, module in model.named_modules())


def test_an_unknown_transform_names_the_nearest() -> None:
    model = random_model("llama")
    with (
        pytest.raises(SchemeError, match=r"found 'smoth'\..*smooth"),
        transformed(model, ("smoth",), tokens(1), {}),
    ):
        pass


def test_bias_correction_keeps_the_mean_output() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 8, generator=generator, dtype=torch.float64) + 1
    weight, bias = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64), torch.ones(5).double()
    corrected = correct_bias(weight[0], weight[1], bias, inputs.mean(0))
    torch.testing.assert_close(
        (inputs @ weight[1].T + corrected).mean(0), (inputs @ weight[0].T + bias).mean(0)
    )
    without = correct_bias(weight[0].float(), weight[1].float(), None, inputs.mean(0).float())
    assert without.dtype == torch.float32
    torch.testing.assert_close(without, (corrected - bias).float())


def test_bias_correction_refuses_what_does_not_fit() -> None:
    weight = torch.zeros(2, 3)
    with pytest.raises(SchemeError, match=r"a mean for each column: found \[2, 3\], \[2, 3\] and \[2\]"):
        correct_bias(weight, weight, None, torch.zeros(2))
    with pytest.raises(SchemeError, match="finite mean inputs"):
        correct_bias(weight, weight, None, torch.full((3,), torch.nan))

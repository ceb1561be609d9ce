"""The declared graphs, as data and against the toys."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantlab.attention.variants import VARIANTS
from quantlab.errors import SchemeError
from quantlab.inspection.families import FAMILIES
from quantlab.inspection.graph import GRAPHS, VARIANT_GRAPHS, graph_of, rows_of, sources_of
from quantlab.transforms.edges import find_edges, graph_for
from tests.quantlab.transforms.models import CASES, random_model
from tests.toys import toy_model


def test_every_variant_and_every_family_has_a_graph() -> None:
    assert VARIANT_GRAPHS.keys() == VARIANTS.keys()
    assert GRAPHS.keys() | {"quantlab"} == FAMILIES.keys()


def test_an_architecture_without_a_graph_is_refused() -> None:
    config = AutoConfig.for_model(
        "stablelm", hidden_size=256, num_hidden_layers=1, vocab_size=8, intermediate_size=8
    )
    assert graph_of("stablelm") is None
    with pytest.raises(SchemeError, match=r"a transform needs a declared graph .* stablelm has none"):
        graph_for(AutoModelForCausalLM.from_config(config))


def test_a_config_that_the_graph_does_not_cover_is_refused() -> None:
    model = toy_model("opt", do_layer_norm_before=False)
    with pytest.raises(SchemeError, match="holds where do_layer_norm_before is True: this config has False"):
        graph_for(model)


def test_a_model_without_the_modules_of_its_graph_is_refused() -> None:
    with pytest.raises(
        SchemeError, match=r"the graph of LlamaModel names model\.layers, which this model has not"
    ):
        find_edges(toy_model("llama").model)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("diff_v2", "gated", "dex")])
def test_scale_does_not_pass_through_a_norm_of_heads(variant: str) -> None:
    graph = VARIANT_GRAPHS[variant]
    assert graph.values is not None
    has_head_norm = variant in ("diff_v1", "grouped_diff", "shared_diff")
    assert graph.values.scales == (not has_head_norm)
    assert (graph.values.gain is not None) == has_head_norm


def test_diffllama_has_a_head_norm_without_gain() -> None:
    values = GRAPHS["diffllama"].values
    assert values is not None
    assert (values.scales, values.gain) == (False, None)


@pytest.mark.parametrize("case", CASES)
def test_whatever_reads_a_norm_is_declared(case: str) -> None:
    """Each module with a matrix that gets the very tensor which a norm gave is a reader in the graph."""
    model = random_model(case)
    given: dict[int, str] = {}
    read: dict[str, set[str]] = {}
    kept = []
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    edges = {edge.source: edge for edge in find_edges(model, ("norm",))}

    def see(module: torch.nn.Module, args: tuple[object, ...], output: object) -> None:
        name = names[id(module)]
        kept.append((args, output))  # so that no tensor takes the place of another
        if name in edges:
            given[id(output)] = name
        for each in args:
            source = given.get(id(each))
            if source is not None and any(
                parameter.ndim == 2 for parameter in module.parameters(recurse=False)
            ):
                read.setdefault(source, set()).add(name)

    handles = [module.register_forward_hook(see) for module in model.modules()]
    with torch.no_grad():
        model(torch.arange(12)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    if not any(edge.shifts for edge in edges.values()):
        assert read.keys() == edges.keys()
    for source, readers in read.items():
        assert readers == {name for name in edges[source].readers if not name.endswith(".direction")}


def test_rows_of_fused_projections() -> None:
    assert rows_of("all", 4, 2, 2) == [0, 1, 2, 3]
    assert rows_of("second_half", 6, 1, 0) == [3, 4, 5]
    # 2 query heads, 1 key head, 1 value head of 2 channels
    assert rows_of("last_values", 8, 2, 1) == [6, 7]
    # 2 heads of query, key, value with 2 channels each
    assert rows_of("within_heads", 12, 2, 2) == [4, 5, 10, 11]
    # v_0 .. v_3 of 1 channel: heads are v_0 beside v_2 and v_1 beside v_3
    assert rows_of("value_halves", 4, 2, 2) == [0, 2, 1, 3]


def test_output_heads_read_the_value_head_of_their_group() -> None:
    # 4 output heads of 2 channels on 2 value heads
    assert sources_of(8, 4, 2) == [0, 1, 0, 1, 2, 3, 2, 3]
    assert sources_of(4, 4, 2) == [0, 1, 2, 3]


def test_layers_that_share_a_block_have_its_edges_once() -> None:
    model = random_model("continuous_depth")
    assert len(model.model.layers) == 2
    assert {edge.source.split(".")[2] for edge in find_edges(model)} == {"0"}

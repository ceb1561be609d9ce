"""Walking block by block is the model: same hidden states, whatever the family."""

import pytest
import torch
from torch import nn

import probes.sites
from quantlab.calibration.stream import walk_blocks
from quantlab.errors import CalibrationError
from tests import toys


def _ids(num_sequences: int = 4, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, toys.NUM_TOKENS, (num_sequences, length), generator=generator)


def _entering(model: nn.Module, ids_NT: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters each decoder layer in an ordinary forward."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: found.update(
                {name: (args[0] if args else kwargs["hidden_states"]).clone()}
            ),
            with_kwargs=True,
        )
        for name, layer in probes.sites.decoder_layers(model)
    ]
    with torch.no_grad():
        model(ids_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _norm_and_head(model: nn.Module, hidden_NTD: torch.Tensor, ids_NT: torch.Tensor) -> torch.Tensor:
    """Logits from the last layer's outputs: an ordinary forward whose last layer gives them."""
    last = probes.sites.decoder_layers(model)[-1][1]
    handle = last.register_forward_hook(
        lambda module, args, output: (hidden_NTD, *output[1:]) if isinstance(output, tuple) else hidden_NTD
    )
    with torch.no_grad():
        logits: torch.Tensor = model(ids_NT, use_cache=False).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_the_walk_gives_every_layer_what_the_model_gives_it(family: str) -> None:
    model, ids_NT = toys.toy_model(family, gain=4.0), _ids()
    expected = _entering(model, ids_NT)
    with torch.no_grad():
        logits = model(ids_NT, use_cache=False).logits
    names = []
    for step in walk_blocks(model, ids_NT, batch_size=4):
        assert torch.equal(step.inputs_NTD, expected[step.name])
        names.append(step.name)
        with torch.no_grad():
            last = step.run(0, 4)
        # the layer left its inputs as they were
        assert torch.equal(step.inputs_NTD, expected[step.name])
    assert names == list(expected)
    assert torch.equal(_norm_and_head(model, last, ids_NT), logits)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_any_batches_and_any_part_give_the_same_to_rounding(family: str) -> None:
    model, ids_NT = toys.toy_model(family), _ids(5)
    whole = [step.inputs_NTD.clone() for step in walk_blocks(model, ids_NT, batch_size=5)]
    for expected, step in zip(whole, walk_blocks(model, ids_NT, batch_size=2), strict=True):
        torch.testing.assert_close(step.inputs_NTD, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(step.run(1, 4), step.run(0, 5)[1:4], rtol=1e-4, atol=1e-5)


def test_a_layer_that_changes_in_the_loop_changes_what_follows() -> None:
    model, ids_NT = toys.toy_model(), _ids()
    steps = walk_blocks(model, ids_NT)
    before = next(steps).inputs_NTD.clone()
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.zero_()
    assert torch.equal(next(steps).inputs_NTD, before)  # only the residual stream is left


def test_outputs_that_the_consumer_sets_are_the_next_inputs() -> None:
    model, ids_NT = toys.toy_model(), _ids()
    steps = walk_blocks(model, ids_NT)
    step = next(steps)
    step.outputs_NTD = torch.full_like(step.inputs_NTD, 0.5)
    assert torch.equal(next(steps).inputs_NTD, torch.full_like(step.inputs_NTD, 0.5))


def test_inputs_and_outputs_share_memory() -> None:
    steps = walk_blocks(toys.toy_model(), _ids())
    assert next(steps).inputs_NTD.data_ptr() == next(steps).inputs_NTD.data_ptr()


def test_the_model_is_what_it_was() -> None:
    model, ids_NT = toys.toy_model(), _ids()
    modules = dict(model.named_modules())
    next(walk_blocks(model, ids_NT)).run(0, 1)
    assert dict(model.named_modules()) == modules


def test_gradients_flow_where_the_caller_wants_them() -> None:
    step = next(walk_blocks(toys.toy_model(), _ids()))
    step.run(0, 2).sum().backward()
    assert all(parameter.grad is not None for parameter in step.layer.parameters())


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_layers_integrated_over_depth_are_refused(solver: str) -> None:
    model = toys.toy_model("quantlab", variant="continuous_depth", variant_options={"solver": solver})
    with pytest.raises(CalibrationError, match=r"layers must run one after another.*QuantlabForCausalLM"):
        next(walk_blocks(model, _ids()))


def test_a_stack_that_changes_hidden_states_between_layers_is_refused() -> None:
    model = toys.toy_model()
    plain = model.model.forward

    def doubled(**kwargs: object) -> object:
        first = model.model.layers._modules["1"]
        model.model.layers._modules["1"] = _Doubled(first)
        try:
            return plain(**kwargs)
        finally:
            model.model.layers._modules["1"] = first

    model.model.forward = doubled
    with pytest.raises(CalibrationError, match="layers must run one after another"):
        next(walk_blocks(model, _ids()))


def test_arguments_that_depend_on_the_tokens_are_refused() -> None:
    model = toys.toy_model()
    plain = model.model.rotary_emb.forward

    def by_text(x: torch.Tensor, *args: object, **kwargs: object) -> object:
        cos, sin = plain(x, *args, **kwargs)
        return cos * (1 + x.mean()), sin

    model.model.rotary_emb.forward = by_text
    with pytest.raises(
        CalibrationError, match=r"must not depend on the tokens.*those of model\.layers\.0 do"
    ):
        next(walk_blocks(model, _ids(), batch_size=2))


class _Doubled(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, **kwargs: object) -> torch.Tensor:
        found: torch.Tensor = self.layer(hidden * 2, **kwargs)
        return found


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (2, 0), (8,)])
def test_empty_text_and_single_tokens_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match=r"at least one sequence of two tokens.*\[.*\].*longer text"):
        next(walk_blocks(toys.toy_model(), torch.zeros(shape, dtype=torch.long)))

"""Sensitivities against quantizing the whole model but for one linear; what is measured once is not measured again."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from probes.sites import decoder_layers
from quantlab.allocation import sensitivity
from quantlab.allocation.config import AllocationConfig
from quantlab.allocation.divergence import Reference
from quantlab.allocation.sensitivity import Sensitivities
from quantlab.allocation.tails import Tails
from quantlab.allocation.units import Unit, units_of
from quantlab.config import CheckpointConfig
from quantlab.errors import EvaluationError, RecordError
from quantlab.layers.linear import weight_of
from quantlab.methods import rtn
from quantlab.schemes import Scheme, TensorSpec
from tests.toys import toy_model

WIDTHS = ("w8", "w4g32", "w2g32")
MADE_BY = {"kind": "sensitivity", "checkpoint": "toy"}
measure = partial(sensitivity.measure, scale_dtype=torch.float32)


def _units(model: nn.Module, widths: tuple[str, ...] = WIDTHS) -> list[Unit]:
    config = AllocationConfig(checkpoint=CheckpointConfig(path="toy"), bits=4.0, widths=widths)
    return units_of(model, config, 32)


def _ids(sequences: int = 2) -> Tensor:
    return torch.randint(0, 512, (sequences, 24), generator=torch.Generator().manual_seed(0))


def _by_hand(model: nn.Module, name: str, width: str, ids_NT: Tensor) -> float:
    """The definition: the weight is replaced, the whole model runs."""
    linear, spec = model.get_submodule(name), Scheme.parse(width).weights
    assert isinstance(spec, TensorSpec) and isinstance(linear.weight, Tensor)
    with torch.no_grad():
        clean = [model(ids[None]).logits[0] for ids in ids_NT]
        kept = linear.weight.clone()
        rounded = rtn.quantize_weight(weight_of(linear), spec).dequantize()
        weight_of(linear).copy_(rounded)
        changed = [model(ids[None]).logits[0] for ids in ids_NT]
        linear.weight.copy_(kept)
    return sum(Reference(p).divergence(q) for p, q in zip(clean, changed, strict=True)) / len(clean)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "bloom", "diffllama", "quantlab"])
def test_sensitivity_is_the_divergence_of_the_model_with_one_rounded_matrix(
    family: str, tmp_path: Path
) -> None:
    model, ids_NT = toy_model(family, gain=3.0), _ids()
    units, known = _units(model), Sensitivities.open(tmp_path, MADE_BY)
    assert measure(model, units, WIDTHS, ids_NT, known) == len(units) * len(WIDTHS) * 2
    for unit in (units[0], units[-1]):
        for width in WIDTHS:
            by_hand = _by_hand(model, unit.name, width, ids_NT)
            assert known.of(unit.name, width) == pytest.approx(by_hand, rel=1e-3, abs=1e-9)
            assert known.of(unit.name, width) > 0


def test_the_model_is_the_same_afterwards(tmp_path: Path) -> None:
    model, ids_NT = toy_model("llama"), _ids(1)
    modules, state = list(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    measure(model, _units(model), WIDTHS, ids_NT, Sensitivities.open(tmp_path, MADE_BY))
    assert list(model.named_modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_tail_runs_no_layer_before_its_own() -> None:
    model = toy_model("gemma2")
    tails, calls = Tails(model, _ids()[0]), []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, layer in decoder_layers(model)
    ]
    assert torch.equal(tails.logits(1), tails.clean_TV)
    assert calls == ["model.layers.1"]
    for handle in handles:
        handle.remove()


def test_layers_that_run_twice_are_run_from_the_first() -> None:
    model = toy_model("llama", gain=3.0, num_hidden_layers=4)
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    layers[2], layers[3] = layers[0], layers[1]
    tails = Tails(model, _ids()[0])
    with torch.no_grad():
        layers[1].get_submodule("mlp.up_proj").weight.mul_(1.5)
        expected = model(_ids()[:1], use_cache=False).logits[0]
    assert torch.equal(tails.logits(1), expected) and not torch.equal(expected, tails.clean_TV)


def test_nothing_is_measured_twice_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    model, ids_NT = toy_model("llama"), _ids()
    units = _units(model)
    whole = Sensitivities.open(tmp_path / "whole", MADE_BY)
    measure(model, units, WIDTHS, ids_NT, whole)

    seen = 0

    def interrupt(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(
            model, units, WIDTHS, ids_NT, Sensitivities.open(tmp_path / "cut", MADE_BY), advance=interrupt
        )
    again = Sensitivities.open(tmp_path / "cut", MADE_BY)
    advanced: list[int] = []
    left = measure(model, units, WIDTHS, ids_NT, again, advance=advanced.append)
    assert left == len(units) * len(WIDTHS) * 2 - 51
    assert sum(advanced) == len(units) * len(WIDTHS) * 2
    assert again.table == whole.table
    assert measure(model, units, WIDTHS, ids_NT, Sensitivities.open(tmp_path / "cut", MADE_BY)) == 0


def test_a_new_width_is_measured_alone(tmp_path: Path) -> None:
    model, ids_NT = toy_model("llama"), _ids(1)
    known = Sensitivities.open(tmp_path, MADE_BY)
    measure(model, _units(model), WIDTHS, ids_NT, known)
    more = (*WIDTHS, "w6", "w16")
    assert measure(model, _units(model, more), more, ids_NT, known) == len(_units(model))
    assert known.of("model.layers.0.self_attn.q_proj", "w16") == 0


def test_weights_that_overflow_in_the_output_name_the_linear(tmp_path: Path) -> None:
    model = toy_model("llama")
    model.get_submodule("lm_head").register_forward_hook(lambda _m, _a, out: out * torch.inf)
    with pytest.raises(
        EvaluationError, match=r"a divergence must be finite: model\.layers\.0\.self_attn\.q_proj at w8"
    ):
        measure(model, _units(model), WIDTHS, _ids(1), Sensitivities.open(tmp_path, MADE_BY))


@pytest.mark.parametrize("damage", ["cut", "other", "text"])
def test_a_kept_file_that_is_not_what_it_should_be_is_refused(damage: str, tmp_path: Path) -> None:
    known = Sensitivities.open(tmp_path, MADE_BY)
    known.add("linear", {"w8": 1e-3})
    body = json.loads(known.path.read_bytes())
    if damage == "cut":
        known.path.write_bytes(known.path.read_bytes()[:-20])
    elif damage == "other":
        known.path.write_text(json.dumps(body | {"made_by": {"checkpoint": "another"}}))
    else:
        known.path.write_text(json.dumps(body | {"divergences": {"linear": {"w8": ["many"]}}}))
    with pytest.raises(
        RecordError, match="kept divergences must be as they were written, and of these inputs"
    ):
        Sensitivities.open(tmp_path, MADE_BY)

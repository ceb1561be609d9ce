"""What does not fit a model is refused before anything is changed."""

import pytest
import torch
from torch import Tensor, nn

from probes.errors import ProbeError
from probes.sites import decoder_layers
from quantlab.config import QuantizeConfig
from quantlab.errors import SchemeError
from quantlab.layers.linear import QuantLinear
from quantlab.quantize import quantize_, quantized
from quantlab.schemes import Scheme
from tests.quantlab.whole_models import ids, model_of, modules_of, run
from tests.toys import toy_model


@pytest.mark.parametrize("name", ["w4", "a8"])
def test_a_matrix_of_several_names_is_skipped_whole_or_not_at_all(name: str) -> None:
    model = toy_model("llama")
    layers = model.model.layers
    layers[1].mlp = layers[0].mlp
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    modules = modules_of(model)
    for leaf in ("mlp.up_proj", "self_attn.q_proj"):
        one, other = (f"model.layers.{i}.{leaf}" for i in (0, 1))
        for kept, quantized_too in ((one, other), (other, one)):
            message = f"{quantized_too} and {kept} are one matrix.* Skip both or neither"
            with pytest.raises(SchemeError, match=message):
                quantize_(model, Scheme.parse(name), QuantizeConfig(skip=[kept]))
            assert modules_of(model) == modules
    with quantized(model, Scheme.parse("w4"), QuantizeConfig(skip=["*.up_proj", "*.q_proj"])) as changes:
        run(model, ids())
    # Held twice and counted once: the MLP's 3 matrices of 6144 and q of 4096; of k and v 2048 and o 4096 two each.
    assert changes.share_by_bits == {4: 28672 / 38912, 16: (6144 + 4096) / 38912}
    with quantized(model, Scheme.parse("w4")) as changes:
        assert changes.share_by_bits == {4: 1.0}
        q = [layer.self_attn.q_proj for layer in layers]
        assert all(isinstance(linear, QuantLinear) for linear in q) and torch.equal(q[0].weight, q[1].weight)
    assert sum(row.num_weights for row in changes.rows) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.ndim > 1
    )


def test_a_linear_tied_to_something_outside_the_decoder_is_refused() -> None:
    model = toy_model("llama")
    layer = model.model.layers[1]
    layer.extra = nn.Linear(64, 512, bias=False)
    layer.extra.weight = model.model.embed_tokens.weight
    message = (
        r"model.layers.1.extra and model.embed_tokens are one matrix.*\. Add \"model.layers.1.extra\" to skip"
    )
    with pytest.raises(SchemeError, match=message):
        quantize_(model, Scheme.parse("w4"))
    with quantized(model, Scheme.parse("w4"), QuantizeConfig(skip=["*.extra"])) as changes:
        assert isinstance(layer.self_attn.q_proj, QuantLinear)
    assert changes.share_by_bits == {4: 1.0}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 16, 64))


def test_fused_experts_are_refused_or_skipped_and_counted() -> None:
    model = toy_model("llama")
    model.model.layers[0].experts = Experts()
    modules = modules_of(model)
    message = r"no nn.Linear, .*: model.layers.0.experts.up is \[4, 16, 64\]. Add \"\*.up\" to skip"
    with pytest.raises(SchemeError, match=message), quantized(model, Scheme.parse("w8a8")):
        pass
    assert modules_of(model) == modules
    with quantized(model, Scheme.parse("w8"), QuantizeConfig(skip=["*.experts.*"])) as changes:
        assert changes.share_by_bits[16] == 4096 / (4096 + 61440)
    with quantized(model, Scheme.parse("l8t")):
        run(model, ids())


@pytest.mark.parametrize(
    ("name", "skip", "kernel", "message"),
    [
        (
            "w4g64",
            [],
            "integer",
            r"model.layers.0.mlp.down_proj has in_features=96, group_size=64. Use group_size=32",
        ),
        ("w8a8g64", [], "integer", r"group_size must divide in_features: model.layers.0.mlp.down_proj"),
        ("w4", ["*.upproj"], "integer", r"'\*.upproj' matches none. Did you mean '\*.up_proj'"),
        ("w4", ["zzz"], "integer", r"'zzz' matches none. There are \*.q_proj, \*.k_proj"),
        ("w4", ["*"], "integer", r"the 14 of LlamaForCausalLM are all skipped. Skip less"),
        ("a8", ["model.layers.*"], "integer", r"the 14 of LlamaForCausalLM are all skipped"),
    ],
)
def test_what_cannot_be_honoured_is_refused(name: str, skip: list[str], kernel: str, message: str) -> None:
    model = toy_model("llama")
    modules = modules_of(model)
    with (
        pytest.raises(SchemeError, match=message),
        quantized(model, Scheme.parse(name), QuantizeConfig(skip=skip, kernel=kernel)),
    ):
        pass
    assert modules_of(model) == modules
    with pytest.raises(SchemeError, match=message):
        quantize_(model, Scheme.parse(name), QuantizeConfig(skip=skip, kernel=kernel))
    assert modules_of(model) == modules


def test_models_without_decoder_linears_are_refused() -> None:
    model = toy_model("llama")
    for _, layer in decoder_layers(model):
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                setattr(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.Identity())
    with pytest.raises(SchemeError, match=r"of the decoder layers: LlamaForCausalLM has none"):
        quantize_(model, Scheme.parse("w4"))
    with pytest.raises(ProbeError, match="decoder layers"):
        quantize_(nn.Sequential(nn.Linear(4, 4)), Scheme.parse("w4"))


def test_weights_that_are_codes_already_are_refused() -> None:
    class Linear8(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.to(x.dtype).t()

    model = toy_model("llama")
    coded = Linear8(64, 96, bias=False)
    coded.weight = nn.Parameter(torch.zeros(96, 64, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.up_proj = coded
    with pytest.raises(
        SchemeError, match=r"model.layers.0.mlp.up_proj holds codes already. Load the checkpoint deq"
    ):
        quantize_(model, Scheme.parse("w4"))
    with quantized(model, Scheme.parse("w4"), QuantizeConfig(skip=["*.0.mlp.up_proj"])):
        run(model, ids())


def test_schemes_that_need_calibration_say_so() -> None:
    for name, needs in (
        ("w4-gptq", "inputs, tokens"),
        ("w4-rotate", "tokens"),
        ("kv8ts", "attention, tokens"),
    ):
        with pytest.raises(SchemeError, match=rf"{name} needs calibration \({needs}\): none was given"):
            quantize_(model_of(), Scheme.parse(name))

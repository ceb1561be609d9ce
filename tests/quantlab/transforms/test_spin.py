"""The learned rotation: lowers the divergence of the rounded model, and is a rotation like any other."""

import re
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quantlab.calibration.calibrator import Calibrator
from quantlab.config import QuantizeConfig
from quantlab.errors import SchemeError
from quantlab.quantize import quantized
from quantlab.schemes import Scheme
from quantlab.transforms import spin
from quantlab.transforms.apply import transformed
from quantlab.transforms.config import TransformConfig
from quantlab.transforms.edit import Undo, restore
from quantlab.transforms.guard import Guard, logits_of
from quantlab.transforms.hadamard import random_rotation
from quantlab.transforms.rotate import fold_residual_, rotate_, rotate_residual_
from quantlab.transforms.spin import rounded, spin_
from tests.quantlab.transforms.models import random_model, tokens

QUICK = TransformConfig(spin_steps=4)


def test_rounding_is_that_of_symmetric_integers_and_passes_gradients() -> None:
    x = torch.tensor([[7.0, 3.4, -1.6], [0.0, 0.0, 0.0]], requires_grad=True)
    found = rounded(x, 4)
    assert torch.equal(found, torch.tensor([[7.0, 3.0, -2.0], [0.0, 0.0, 0.0]]))
    weights = torch.arange(6.0).view(2, 3)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    assert torch.equal(gradient, weights)


def divergences(model: torch.nn.Module, ids: Tensor, wanted: Tensor) -> Tensor:
    """KL from the wanted logits to the model's, mean over the tokens of each sequence [N]."""
    found, wanted = logits_of(model, ids).log_softmax(-1), wanted.log_softmax(-1)
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean(-1)


def divergence(model: torch.nn.Module, ids: Tensor, wanted: Tensor) -> float:
    """The mean of `divergences`."""
    return float(divergences(model, ids, wanted).mean())


MIXED = "flow flow_encoder=True"
"""Has vectors that read the residual stream, and are not rounded."""


@pytest.mark.parametrize("scheme", ["w4a4", "a4"])
@pytest.mark.parametrize(
    "case", ["llama", "qwen2", "diff_v1", "diff_v2", "shared_diff", "dex heads=0,3", MIXED]
)
def test_the_rounded_model_is_the_quantized_one(case: str, scheme: str) -> None:
    """What is lowered is the divergence of a scheme on the rotated model. In float64 no rounding moves a code."""
    model, ids = random_model(case).double(), tokens(4)
    wanted, undo = logits_of(model, ids), Undo()
    fold_residual_(model, undo)
    rotate_(model, undo, parts=("values", "down"))
    q_DD = random_rotation(64, torch.Generator().manual_seed(0)).matrix
    with torch.no_grad():
        found = float(spin._divergence_of(model, 4, "w" in scheme)(q_DD, ids))
    rotate_residual_(model, lambda x: x @ q_DD, undo)
    with quantized(model, Scheme.parse(scheme)):
        expected = divergence(model, ids, wanted)
    restore(undo)
    assert expected > 0.005
    # but logits are compared in float32
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "inputs"])
@pytest.mark.parametrize("case", ["llama", "diff_v1", "shared_diff", MIXED])
def test_the_gradient_is_the_slope(case: str, weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding has no slope: something smooth that does not turn either stands in for it."""
    monkeypatch.setattr(spin, "rounded", lambda x, bits: x + 0.2 * torch.sin(3 * x))
    model, ids = random_model(case).double(), tokens(2)
    fold_residual_(model, Undo())
    error, generator = spin._divergence_of(model, 4, weights), torch.Generator().manual_seed(0)
    q_DD = random_rotation(64, generator).matrix.requires_grad_()
    (gradient_DD,) = torch.autograd.grad(error(q_DD, ids), q_DD)
    half_DD = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    skew_DD = (half_DD - half_DD.T) / 20
    expected = float((gradient_DD * (skew_DD @ q_DD.detach())).sum())
    with torch.no_grad():
        ends = [float(error(torch.linalg.matrix_exp(t * skew_DD) @ q_DD, ids)) for t in (-1e-3, 1e-3)]
    # logits are compared in float32: eps of their size, some 10, over the span of 2e-3
    assert (ends[1] - ends[0]) / 2e-3 == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_learning_lowers_the_divergence_of_the_quantized_model() -> None:
    """Every token has one of four directions that the random rotation turns into one channel: outliers to unlearn.

    What is learned amplifies the last digits of float sums, so that each CPU learns another rotation: lower is what
    lies beyond three standard errors, over sequences that both see.
    """
    model, ids = random_model("llama"), tokens(128)
    start_DD = random_rotation(64, torch.Generator().manual_seed(0)).matrix.float()
    embedding_VD = model.get_input_embeddings().weight.data
    embedding_VD += 3 * embedding_VD.norm(dim=-1).mean() * start_DD[:, torch.arange(512) % 4].T
    learned_from, others = ids[:64], ids[64:]
    wanted, found = logits_of(model, others), dict[str, Tensor]()
    settings = TransformConfig(spin_learning_rate=0.1, spin_batch_size=8)
    for name in ("rotate", "spin"):
        config, text = QuantizeConfig(transforms=settings), Calibrator(learned_from)
        with quantized(model, Scheme.parse(f"w4a4-{name}"), config, calibrator=text):
            found[name] = divergences(model, others, wanted)
    lower = found["rotate"] - found["spin"]
    assert lower.mean() > 3 * lower.std() / len(lower) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case", ["llama", "llama tie_word_embeddings=True", "diff_v1", "diff_v2", "shared_diff"]
)
def test_spin_keeps_the_function_and_comes_back(case: str, dtype: torch.dtype) -> None:
    model, ids = random_model(case, dtype), tokens(4)
    modules, undo = dict(model.named_modules()), Undo()
    notes = Guard(model, ids).apply("spin", partial(spin_, model, ids, num_steps=2), undo)
    assert "on sequences not learned from" in notes[0]
    assert any("was tied" in note for note in notes) == ("tie" in case)
    restore(undo)
    now = dict(model.named_modules())
    assert now.keys() == modules.keys() and all(now[key] is modules[key] for key in modules)


def test_spin_is_never_worse_than_the_rotation_it_starts_from() -> None:
    model = random_model("llama")
    with transformed(model, ("rotate", "spin"), tokens(4), {}, config=QUICK) as notes:
        said = next(note for note in notes if "not learned from" in note)
        start, end = (float(x) for x in re.findall(r"([\d.]+) (?:nats|after)", said))
        assert 0 < end <= start


def test_spin_depends_on_its_seed_alone() -> None:
    weights = []
    for seed in (0, 0, 1):
        model, ids = random_model("llama"), tokens(4)
        with transformed(model, ("spin",), ids, {}, config=QUICK.model_copy(update={"rotate_seed": seed})):
            weights.append(model.lm_head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_weights_are_left_out_on_request() -> None:
    heads, said = [], []
    for weights in (True, False):
        model, config = random_model("llama"), QUICK.model_copy(update={"spin_weights": weights})
        with transformed(model, ("spin",), tokens(16), {}, config=config) as notes:
            said.append(notes[0])
            heads.append(model.lm_head.weight.detach().clone())
    assert "with 4-bit inputs and weights, on" in said[0] and "with 4-bit inputs, on" in said[1]
    assert not torch.equal(heads[0], heads[1])


def test_spin_learns_in_inference_mode() -> None:
    heads = []
    for inference in (False, True):
        model, ids = random_model("llama"), tokens(16)
        with torch.inference_mode(inference), transformed(model, ("spin",), ids, {}, config=QUICK):
            heads.append(model.lm_head.weight.detach().clone())
    assert torch.equal(*heads)


def test_the_model_is_whole_after_an_error_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, calls = random_model("llama"), tokens(4), []

    def failing(x: Tensor, bits: int) -> Tensor:
        calls.append(x)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return rounded(x, bits)

    monkeypatch.setattr(spin, "rounded", failing)
    modules = list(model.modules())
    with pytest.raises(KeyboardInterrupt), transformed(model, ("spin",), ids, {}, config=QUICK):
        pass
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_spin_is_refused_where_it_cannot_be_learned() -> None:
    model = random_model("gpt2")
    with pytest.raises(SchemeError, match="its residual may be rotated, since LayerNorm"):
        spin_(model, tokens(2), [])
    with pytest.raises(SchemeError, match=r"found parts values\. Use rotate"):
        spin_(random_model("llama"), tokens(2), [], parts=("values",))
    with pytest.raises(SchemeError, match=r"judges by others: found 1\. Give at least 2"):
        spin_(random_model("llama"), tokens(1), [])

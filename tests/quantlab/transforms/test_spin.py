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
from quantlab.transforms.spin import learn_rotation, rounded, spin_
from tests.quantlab.transforms.models import random_model, tokens

QUICK = TransformConfig(spin_steps=4)


def test_rounding_is_that_of_symmetric_integers_and_passes_gradients() -> None:
    x = torch.tensor([[7.0, 3.4, -1.6], [0.0, 0.0, 0.0]], requires_grad=True)
    found = rounded(x, 4)
    assert torch.equal(found, torch.tensor([[7.0, 3.0, -2.0], [0.0, 0.0, 0.0]]))
    weights = torch.arange(6.0).view(2, 3)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    assert torch.equal(gradient, weights)


def lost(q_DD: Tensor, x_ND: Tensor) -> Tensor:
    """Mean over vectors of the part that rounding to 4 bits loses."""
    turned_ND = x_ND @ q_DD
    scale_N1 = turned_ND.abs().amax(-1, keepdim=True) / 7
    codes_ND = (turned_ND / scale_N1).round().detach()
    found: Tensor = ((turned_ND - scale_N1 * codes_ND).square().sum(-1) / x_ND.square().sum(-1)).mean()
    return found


def test_learning_lowers_the_error_on_other_vectors() -> None:
    """Vectors that mix 4 directions: a rotation that turns these well serves others of their kind."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 16, generator=generator)
    learn, judge = (torch.randn(512, 4, generator=generator) @ directions for _ in range(2))
    start = random_rotation(16, generator).matrix
    q, found = learn_rotation(start, lost, learn, judge, num_steps=20, batch_size=512, learning_rate=0.1)
    assert len(found) == 5
    assert min(found) < 0.95 * found[0]
    assert float(lost(q.float(), judge)) == pytest.approx(min(found), rel=1e-6)
    # each of 20 solves leaves a few roundings
    assert (q @ q.T - torch.eye(16)).abs().max() < 20 * 16 * torch.finfo(torch.float64).eps


def test_a_step_too_large_keeps_the_start() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(16)[torch.randint(0, 16, (64,), generator=generator)]
    away = torch.randn(16, 16, generator=generator)
    start = torch.eye(16, dtype=torch.float64)  # rounds unit vectors without error
    error = lambda q, x: lost(q, x) + 0 * (q * away).sum()  # noqa: E731
    q, found = learn_rotation(start, error, x, x, num_steps=3, batch_size=64, learning_rate=10.0)
    assert found[0] == 0
    assert torch.equal(q, start)


def test_every_example_is_learned_from_in_turn() -> None:
    seen: list[float] = []

    def error(q_DD: Tensor, x_ND: Tensor) -> Tensor:
        if q_DD.requires_grad:
            seen.extend(x_ND[:, 0].tolist())
        return lost(q_DD, x_ND)

    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.arange(5)
    start = torch.eye(8, dtype=torch.float64)
    learn_rotation(start, error, x, x, num_steps=4, batch_size=2, learning_rate=0.1)
    assert seen == [0, 1, 2, 3, 4, 0, 1, 2]


def divergence(model: torch.nn.Module, ids: Tensor, wanted: Tensor) -> float:
    """Mean KL from the wanted logits to the model's."""
    found = logits_of(model, ids).flatten(0, 1).log_softmax(-1)
    return float(
        F.kl_div(found, wanted.flatten(0, 1).log_softmax(-1), reduction="batchmean", log_target=True)
    )


@pytest.mark.parametrize("case", ["llama", "diff_v1", "diff_v2", "shared_diff"])
def test_the_rounded_model_is_the_quantized_one(case: str) -> None:
    """What is lowered is the divergence of w4a4 on the rotated model, but for codes that a rounding moves by one."""
    model, ids = random_model(case), tokens(4)
    wanted, undo = logits_of(model, ids), Undo()
    fold_residual_(model, undo)
    rotate_(model, undo, parts=("values", "down"))
    q_DD = random_rotation(64, torch.Generator().manual_seed(0)).matrix
    with torch.no_grad():
        found = float(spin._divergence_of(model, 4)(q_DD.float(), ids))
    rotate_residual_(model, lambda x: x @ q_DD, undo)
    with quantized(model, Scheme.parse("w4a4")):
        expected = divergence(model, ids, wanted)
    restore(undo)
    assert expected > 0.01
    assert found == pytest.approx(expected, rel=0.02)


def test_learning_lowers_the_divergence_of_the_quantized_model() -> None:
    """Every token has one of four directions that the random rotation turns into one channel: outliers to unlearn."""
    model, ids = random_model("llama"), tokens(128)
    start_DD = random_rotation(64, torch.Generator().manual_seed(0)).matrix.float()
    embedding_VD = model.get_input_embeddings().weight.data
    embedding_VD += 3 * embedding_VD.norm(dim=-1).mean() * start_DD[:, torch.arange(512) % 4].T
    learned_from, others = ids[:64], ids[64:]
    wanted, found = logits_of(model, others), dict[str, float]()
    settings = TransformConfig(spin_learning_rate=0.1, spin_batch_size=8)
    for name in ("rotate", "spin"):
        config, text = QuantizeConfig(transforms=settings), Calibrator(learned_from)
        with quantized(model, Scheme.parse(f"w4a4-{name}"), config, calibrator=text):
            found[name] = divergence(model, others, wanted)
    assert found["spin"] < 0.85 * found["rotate"]


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


def test_spin_is_refused_where_it_cannot_be_learned() -> None:
    model = random_model("gpt2")
    with pytest.raises(SchemeError, match="its residual may be rotated, since LayerNorm"):
        spin_(model, tokens(2), [])
    with pytest.raises(SchemeError, match=r"found parts values\. Use rotate"):
        spin_(random_model("llama"), tokens(2), [], parts=("values",))
    with pytest.raises(SchemeError, match=r"judges by others: found 1\. Give at least 2"):
        spin_(random_model("llama"), tokens(1), [])

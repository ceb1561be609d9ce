"""The learned rotation: lowers its own error, never raises it, and is a rotation like any other."""

import re

import pytest
import torch

from quantlab.errors import SchemeError
from quantlab.transforms.apply import transformed
from quantlab.transforms.config import TransformConfig
from quantlab.transforms.edit import Undo, restore
from quantlab.transforms.guard import Guard
from quantlab.transforms.hadamard import random_rotation
from quantlab.transforms.spin import learn_rotation, rounding_error, spin_
from tests.quantlab.transforms.models import random_model, tokens

QUICK = TransformConfig(spin_steps=8, spin_vectors=256)


def test_rounding_error_is_that_of_symmetric_integers() -> None:
    x = torch.tensor([[7.0, 3.4, -1.6], [0.0, 0.0, 0.0]])
    # scale 1: codes 7, 3, -2; a vector of zeros loses nothing
    expected = (0.4**2 + 0.4**2) / (7**2 + 3.4**2 + 1.6**2) / 2
    assert float(rounding_error(x, 4)) == pytest.approx(expected, rel=1e-5)


def test_learning_lowers_the_error_on_other_vectors() -> None:
    """Vectors that mix 4 directions: a rotation that turns these well serves others of their kind."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 16, generator=generator)
    learn, judge = (torch.randn(512, 4, generator=generator) @ directions for _ in range(2))
    start = random_rotation(16, generator).matrix
    q, errors = learn_rotation(start, [learn], [judge], bits=4, num_steps=20, learning_rate=0.1)
    assert min(errors) < 0.9 * errors[0]
    assert float(rounding_error(judge @ q.float(), 4)) == pytest.approx(min(errors), rel=1e-6)
    # each of 20 solves leaves a few roundings
    assert (q @ q.T - torch.eye(16)).abs().max() < 20 * 16 * torch.finfo(torch.float64).eps


def test_a_step_too_large_keeps_the_start() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(16)[torch.randint(0, 16, (64,), generator=generator)]
    start = torch.eye(16, dtype=torch.float64)  # rounds unit vectors without error
    q, errors = learn_rotation(start, [x], [x], bits=4, num_steps=3, learning_rate=10.0)
    assert errors[0] == 0
    assert torch.equal(q, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case", ["llama", "llama tie_word_embeddings=True", "diff_v1", "diff_v2", "shared_diff"]
)
def test_spin_keeps_the_function_and_comes_back(case: str, dtype: torch.dtype) -> None:
    model, ids = random_model(case, dtype), tokens(4)
    modules, undo = dict(model.named_modules()), Undo()
    notes = Guard(model, ids).apply(
        "spin", lambda undo: spin_(model, ids, undo, num_steps=4, num_vectors=128), undo
    )
    assert any("on vectors not learned from" in note for note in notes)
    assert ("was tied" in notes[0]) == ("tie" in case)
    restore(undo)
    now = dict(model.named_modules())
    assert now.keys() == modules.keys() and all(now[key] is modules[key] for key in modules)


def test_spin_is_never_worse_than_the_rotation_it_starts_from() -> None:
    model = random_model("llama")
    with transformed(model, ("rotate", "spin"), tokens(4), {}, config=QUICK) as notes:
        start, end = (float(x) for x in re.findall(r"([\d.]+) (?:with|after)", notes[-1]))
        assert end <= start


def test_spin_depends_on_its_seed_alone() -> None:
    weights = []
    for seed in (0, 0, 1):
        model, ids = random_model("llama"), tokens(4)
        with transformed(model, ("spin",), ids, {}, config=QUICK.model_copy(update={"rotate_seed": seed})):
            weights.append(model.lm_head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_spin_is_refused_where_the_stream_may_not_turn() -> None:
    model = random_model("gpt2")
    with pytest.raises(SchemeError, match="its residual may be rotated, since LayerNorm"):
        spin_(model, tokens(1), [])
    with pytest.raises(SchemeError, match=r"found parts values\. Use rotate"):
        spin_(random_model("llama"), tokens(1), [], parts=("values",))

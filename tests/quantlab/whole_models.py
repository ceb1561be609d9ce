"""Toy models to put schemes on: text, what they answer, and what they are made of."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.calibration.calibrator import Calibrator
from tests.toys import toy_model


def ids(rows: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    """Seeded tokens, [N, T]."""
    return torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def calibrator() -> Calibrator:
    """Six sequences of text."""
    return Calibrator(ids(6), batch_size=3)


def model_of(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A toy whose layers matter to its logits, and whose widths are powers of two."""
    wide = {} if family == "gpt2" else {"intermediate_size": 128}
    return toy_model(family, gain=3.0, **(wide | changes))


@torch.no_grad()
def run(model: PreTrainedModel, tokens: Tensor | None = None) -> Tensor:
    """Logits of two sequences."""
    logits: Tensor = model(ids(2, seed=7) if tokens is None else tokens).logits
    return logits


def modules_of(model: nn.Module) -> list[tuple[str, int]]:
    """Every module under every name, by identity."""
    return [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]


def state_of(model: nn.Module) -> tuple[list[tuple[str, int]], dict[str, Tensor]]:
    """The model's modules, and a copy of its weights."""
    return modules_of(model), {name: value.clone() for name, value in model.state_dict().items()}


def same(one: tuple[Any, dict[str, Tensor]], other: tuple[Any, dict[str, Tensor]]) -> bool:
    """Whether two states are one, bit for bit."""
    return (
        one[0] == other[0]
        and list(one[1]) == list(other[1])
        and all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    )

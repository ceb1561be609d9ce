"""Matrix by matrix: codes of each linear by itself, under several schemes at once where they share their method."""

from collections.abc import Iterator, Sequence

from torch import nn

from quantlab.layers.targets import Target
from quantlab.methods.solved import Solved
from quantlab.solving.asked import Asked
from quantlab.solving.linear import Stats, solve_linear

__all__ = ["solve", "solve_together"]


def solve(model: nn.Module, targets: Sequence[Target], asked: Asked, stats: Stats) -> dict[str, Solved]:
    """Codes of every target that is not to stay at 16 bits, by name; matrix by matrix."""
    together = solve_together(model, targets, [asked], stats)
    return {name: solved[0] for name, solved in together if solved[0] is not None}


def solve_together(
    model: nn.Module, targets: Sequence[Target], asked: Sequence[Asked], stats: Stats
) -> Iterator[tuple[str, list[Solved | None]]]:
    """Codes of each target in turn under several schemes of one method; None where it stays at 16 bits."""
    assert len({each.scheme.method for each in asked}) == 1, (
        "schemes that are solved together share their method"
    )
    for target in targets:
        yield target.name, solve_linear(model.get_submodule(target.name), target.name, asked, stats)

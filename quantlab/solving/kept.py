"""Codes from the store of solutions, or found and put there, so that no cell of a sweep finds them twice."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from quantlab.layers.targets import Target
from quantlab.methods.solved import Solved
from quantlab.solutions import SolutionStore
from quantlab.solving.asked import Asked
from quantlab.solving.linear import Stats
from quantlab.solving.together import solve_together

__all__ = ["kept", "kept_together"]


def kept(
    store: SolutionStore | None, asked: Asked, find: Callable[[], dict[str, Solved]]
) -> dict[str, Solved]:
    """Codes from the store, or found and put there."""
    if store is None:
        return find()
    with store.claimed(asked.scheme):
        known = store.load(asked.scheme)
        if known is None:
            known = find()
            with store.writing([asked.scheme]) as put:
                for name, solved in known.items():
                    put(name, [solved])
        return known


def kept_together(
    model: nn.Module, targets: Sequence[Target], asked: Asked, stats: Stats, store: SolutionStore
) -> dict[str, Solved]:
    """Codes from the store; else all schemes of the run that share the factorization are solved and put there."""
    with store.claimed(asked.scheme):
        known = store.load(asked.scheme)
        if known is not None:
            return known
        schemes, own = store.together(asked.scheme), {}
        alike = [replace(asked, scheme=each) for each in schemes]
        with store.writing(schemes) as put:
            for name, solved in solve_together(model, targets, alike, stats):
                put(name, solved)
                if solved[0] is not None:
                    own[name] = solved[0]
        return own

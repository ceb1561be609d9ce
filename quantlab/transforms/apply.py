"""Transforms by name, one after the other, each proved by the guard before the next.

with transformed(model, ("smooth", "rotate"), ids_NT, stats) as notes:
    ...                                  # the same function, with other weights
                                         # here the same modules as before, however the block ended
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from quantlab.calibration.statistics import LinearStats
from quantlab.errors import SchemeError, nearest
from quantlab.transforms.config import TransformConfig
from quantlab.transforms.edit import Undo, restore
from quantlab.transforms.fold import fold_
from quantlab.transforms.guard import Guard
from quantlab.transforms.rotate import rotate_
from quantlab.transforms.smooth import smooth_
from quantlab.transforms.spin import spin_

__all__ = ["MAKERS", "guard_of", "transform_", "transformed"]

_DEFAULTS = TransformConfig()
Maker = Callable[[nn.Module, Tensor, Mapping[str, LinearStats], TransformConfig, Undo], list[str]]

MAKERS: dict[str, Maker] = {
    "fold": lambda model, ids, stats, config, undo: fold_(model, undo),
    "smooth": lambda model, ids, stats, config, undo: smooth_(model, stats, undo, config.smooth_alpha),
    "rotate": lambda model, ids, stats, config, undo: rotate_(
        model, undo, seed=config.rotate_seed, parts=config.rotate_parts
    ),
    "spin": lambda model, ids, stats, config, undo: spin_(
        model,
        ids[: config.spin_sequences],
        undo,
        seed=config.rotate_seed,
        parts=config.rotate_parts,
        bits=config.spin_bits,
        weights=config.spin_weights,
        num_steps=config.spin_steps,
        batch_size=config.spin_batch_size,
        learning_rate=config.spin_learning_rate,
    ),
}
"""Name in a scheme -> what makes the transform: (model, ids_NT, stats, config, undo) to notes."""


@contextmanager
def transformed(
    model: nn.Module,
    names: Sequence[str],
    ids_NT: Tensor,
    stats: Mapping[str, LinearStats],
    *,
    config: TransformConfig = _DEFAULTS,
) -> Iterator[list[str]]:
    """The model under the transforms for the span of the block; then the same modules as before, however it ends.

    Statistics describe the model as it was: calibrate anew inside the block before solving weights.

    Args:
        names: of `MAKERS`, in order.
        ids_NT: token ids; the guard compares logits of the first `config.guard_sequences`.
        stats: of the linears, for smooth.

    Yields:
        notes: what there is to say, such as a head that was tied.

    Raises:
        SchemeError: an unknown name, a transform that the architecture does not declare, or one that changed the
            function. The model is as it was.
    """
    for name in names:
        if name not in MAKERS:
            raise SchemeError(f"transforms are {', '.join(MAKERS)}: found {name!r}.{nearest(name, MAKERS)}")
    undo: Undo = []
    try:
        yield _apply_all(model, names, ids_NT, stats, config, undo)
    finally:
        restore(undo)


def _apply_all(
    model: nn.Module,
    names: Sequence[str],
    ids_NT: Tensor,
    stats: Mapping[str, LinearStats],
    config: TransformConfig,
    undo: Undo,
) -> list[str]:
    return [note for name in names for note in transform_(model, name, ids_NT, stats, config, undo)]


def transform_(
    model: nn.Module,
    name: str,
    ids_NT: Tensor,
    stats: Mapping[str, LinearStats],
    config: TransformConfig,
    undo: Undo,
) -> list[str]:
    """Make one transform, proved by the guard; what it replaced is noted in `undo`. Arguments are `transformed`'s."""
    change = partial(MAKERS[name], model, ids_NT, stats, config)
    return [f"{name}: {note}" for note in guard_of(model, ids_NT, config).apply(name, change, undo)]


def guard_of(model: nn.Module, ids_NT: Tensor, config: TransformConfig) -> Guard:
    """A guard that remembers the model as it is now."""
    return Guard(model, ids_NT, num_sequences=config.guard_sequences, num_tokens=config.guard_tokens)

"""quantize: put a scheme on a model, say what became of every weight, and take it off again.

    quantize_(model, scheme)            swaps modules for good
    with quantized(model, scheme):      swaps them for the span of the block
    with prepared(model, scheme):       transforms only, and codes of a linear when they are asked for: for writers

In the order in which it is done: transforms change weights without changing the function; methods choose codes
(`quantlab.solving`); linears of the decoder layers become `QuantLinear`; the sites of queries, keys, values, attention
logits, probabilities and joined maps become `FakeQuant`. Everything that shapes and names can tell is checked before
anything is changed. Embeddings and lm_head stay at 16 bits.

How far scores of one scheme agree. Integer linears give the same bits for any batch and order. On a CPU, sequences of
one length got the same hidden states bit for bit in batches of 1 and 8 (SmolLM2-135M, every scheme tried), so their
log-likelihoods differ by the rounding of the head, 1e-4 nats at most. Where the order of a float sum does change (the
integer and the simulated kernel, another place in a packed row), a value near the middle of two codes flips, and a
document's score moves by at most what the scheme itself costs some document: integer against simulated, 48 texts of
57 tokens, w8a8: mean difference 0.0004 +- 0.010 nats per token, largest 0.08, where the scheme costs up to 0.13.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from probes.attention import attention_sites
from quantlab.calibration.calibrator import Calibrator
from quantlab.calibration.statistics import AttentionStats
from quantlab.changes import Change, Changes
from quantlab.config import QuantizeConfig
from quantlab.layers.called import expect_calls_
from quantlab.layers.sites import FoundSite, find_outputs, find_sites, swap_output, swap_site, turn_heads_
from quantlab.layers.targets import Choice, choose_targets
from quantlab.methods.solved import Solved
from quantlab.models.stored import scale_dtype_of
from quantlab.records import fingerprint, source_hash
from quantlab.scheme_fits import check_fits
from quantlab.schemes import TRANSFORMS, Scheme, TensorSpec, WeightFormat
from quantlab.solutions import SolutionStore
from quantlab.solving.asked import Asked
from quantlab.solving.model import solve_model, solve_one_by_one
from quantlab.solving.seen import Inputs
from quantlab.swapping import Work, corrected, stays, swap_linear
from quantlab.transforms.apply import guard_of, transform_
from quantlab.transforms.edit import Undo, restore

__all__ = ["Change", "Changes", "Prepared", "prepared", "quantize_", "quantized"]


def quantize_(
    model: nn.Module,
    scheme: Scheme,
    config: QuantizeConfig = QuantizeConfig(),
    *,
    scale_dtype: torch.dtype | None = None,
    calibrator: Calibrator | None = None,
    solutions: SolutionStore | None = None,
) -> Changes:
    """Put the scheme on the model, for good.

    Args:
        config: linears that stay at 16 bits, kernel, widths of mixed schemes, settings of methods and transforms.
        scale_dtype: dtype that scales of weights are rounded to where a format fixes it; None is what `config` says.
        calibrator: text and statistics, for schemes that need them (`scheme.needs`).
        solutions: where codes that took long are kept; None computes them anew.

    Raises:
        SchemeError: the scheme does not fit the model, needs calibration, a pattern matches nothing, or nothing would
            be quantized; the model is then as it was. What lies inside attention needs `attention_sites(model)` around
            the call.
        CalibrationError: the text or the model cannot be calibrated.
        ProbeError: the model has no decoder layers.
    """
    undo: Undo = []
    try:
        return _apply(
            model,
            Asked(scheme, config, scale_dtype or scale_dtype_of(model, config)),
            calibrator,
            solutions,
            undo,
        )
    except BaseException:
        restore(undo)
        raise


@contextmanager
def quantized(
    model: nn.Module,
    scheme: Scheme,
    config: QuantizeConfig = QuantizeConfig(),
    *,
    scale_dtype: torch.dtype | None = None,
    calibrator: Calibrator | None = None,
    solutions: SolutionStore | None = None,
) -> Iterator[Changes]:
    """The model under the scheme for the span of the block; then the same modules as before, however it ends.

    Takes what `quantize_` takes, and enters `attention_sites(model)` by itself where the scheme has sites.
    """
    undo: Undo = []
    with ExitStack() as stack:
        if scheme.sites or scheme.head_sites:
            stack.enter_context(attention_sites(model))
        stack.callback(restore, undo)
        yield _apply(
            model,
            Asked(scheme, config, scale_dtype or scale_dtype_of(model, config)),
            calibrator,
            solutions,
            undo,
        )


@dataclass(frozen=True)
class Prepared:
    """A model whose transforms are done, and whose codes are to be had."""

    linears: tuple[str, ...]
    """Names of the linears in low bits; of those that share a matrix `solve` knows the first."""
    skipped: tuple[str, ...]
    """Decoder linears that keep their precision by request."""
    solve: Callable[[str], Solved]
    """Codes of one linear."""
    bias: Callable[[str, Solved], torch.Tensor | None]
    """The bias [O] that a linear has beside these codes, where the scheme corrects biases; else None."""
    stats: Inputs
    """What biases and static scales are made of, where the scheme needs it."""
    attention: Mapping[str, AttentionStats]
    """Ranges of queries, keys and values, where the scheme needs them."""
    notes: tuple[str, ...]
    """What transforms have to say."""
    weights_of: Callable[[str], TensorSpec | WeightFormat | None]
    """The grid of one linear; None where it stays at 16 bits and its inputs do not."""


@contextmanager
def prepared(
    model: nn.Module,
    scheme: Scheme,
    config: QuantizeConfig = QuantizeConfig(),
    *,
    scale_dtype: torch.dtype | None = None,
    calibrator: Calibrator | None = None,
) -> Iterator[Prepared]:
    """The model with the scheme's transforms for the span of the block, and its codes one linear at a time.

    Takes and raises what `quantize_` does; the codes are the same.
    """
    undo: Undo = []
    asked = Asked(scheme, config, scale_dtype or scale_dtype_of(model, config))
    with ExitStack() as stack:
        # Calibration then goes through the attention that `quantized` calibrates with.
        if scheme.sites or scheme.head_sites:
            stack.enter_context(attention_sites(model))
        stack.callback(restore, undo)
        choice = check_fits(model, asked, calibrator)
        notes, done = _transform_(model, asked, calibrator, undo)
        choice = choose_targets(model, config.skip) if done else choice
        attention = calibrator.attention(model, done) if calibrator and "attention" in scheme.needs else {}
        own = [target for target in choice.chosen if target.tied_to is None]
        solve, stats = solve_one_by_one(model, own, asked, calibrator, done, undo)
        by_name = {target.name: target for target in own}

        def bias(name: str, solved: Solved) -> torch.Tensor | None:
            work = Work(asked, {name: solved}, stats)
            return corrected(model.get_submodule(name), by_name[name], work)

        names = tuple(target.name for target in choice.chosen)
        skipped = tuple(target.name for target in choice.skipped)
        yield Prepared(names, skipped, solve, bias, stats, attention, tuple(notes), asked.weights_of)


def _apply(
    model: nn.Module, asked: Asked, calibrator: Calibrator | None, solutions: SolutionStore | None, undo: Undo
) -> Changes:
    """Check, transform, solve, swap; what was replaced is noted in `undo`."""
    scheme = asked.scheme
    choice = check_fits(model, asked, calibrator)
    find_outputs(model, scheme)
    if scheme.is_baseline:
        # What a folder of low-bit weights brought along, see `models.low_bit`; nothing elsewhere.
        carried: tuple[Change, ...] = getattr(model, "carried", ())
        return Changes(scheme.name, carried, _size(model) + sum(row.num_weights for row in carried))
    notes, done = _transform_(model, asked, calibrator, undo)
    choice = choose_targets(model, asked.config.skip) if done and choice.chosen else choice
    num_parameters = _size(model)
    attention = calibrator.attention(model, done) if calibrator and "attention" in scheme.needs else None
    sites = find_sites(model, scheme, attention)
    notes += _turn_sites_(model, asked, calibrator, sites, undo)
    own = [target for target in choice.chosen if target.tied_to is None]
    work = Work(asked, *solve_model(model, own, asked, calibrator, done, solutions, undo))
    rows = _swap_(model, choice, sites, work, undo)
    if choice.chosen:
        expect_calls_(model, [target.name for target in choice.chosen], undo)
    return Changes(scheme.name, tuple(rows), num_parameters, tuple(notes))


def _swap_(
    model: nn.Module, choice: Choice, sites: Sequence[FoundSite], work: Work, undo: Undo
) -> list[Change]:
    """Put modules of low bits in the places of linears, sites and outputs of layers; the rows that say so."""
    scheme, skip, chosen = work.asked.scheme, work.asked.config.skip, set(choice.chosen)
    # First, since a layer's linears still tell its device.
    at_sites = [swap_site(layer, prefix, site, quantizer, undo) for prefix, layer, site, quantizer in sites]
    linears = [
        swap_linear(model, target, work, undo) if target in chosen else stays(target, skip)
        for target in choice.targets
    ]
    # Last, since layers are found by what is inside them.
    outputs = [
        swap_output(model, module, name, spec, undo) for name, module, spec in find_outputs(model, scheme)
    ]
    return linears + at_sites + outputs


def _turn_sites_(
    model: nn.Module,
    asked: Asked,
    calibrator: Calibrator | None,
    sites: Sequence[FoundSite],
    undo: Undo,
) -> list[str]:
    """Turn queries and keys ahead of their rounding, where the scheme rotates; notes."""
    if not sites or not {"rotate", "spin"} & set(asked.scheme.transforms):
        return []
    assert calibrator is not None
    guard = guard_of(model, calibrator.ids_NT, asked.config.transforms)
    return guard.apply("rotate of queries and keys", lambda changes: turn_heads_(sites, changes), undo)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _transform_(
    model: nn.Module, asked: Asked, calibrator: Calibrator | None, undo: Undo
) -> tuple[list[str], str]:
    """Make the scheme's transforms, each on statistics of the model as the last one left it; notes, and their names.

    The names carry the settings, so that statistics of the result can be kept under them.
    """
    settings, done, notes = asked.config.transforms, "", list[str]()
    made_by = fingerprint({"settings": settings.model_dump(mode="json"), "code": source_hash()})[:16]
    for name in asked.scheme.transforms:
        if name == "bias":
            continue
        assert calibrator is not None, "schemes with transforms need tokens"
        stats = calibrator.linears(model, done) if "inputs" in TRANSFORMS[name].needs else {}
        notes += transform_(model, name, calibrator.ids_NT, stats, settings, undo)
        done = f"{done or made_by}-{name}"
    return notes, done

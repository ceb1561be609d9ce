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
from dataclasses import dataclass, field

import torch
from torch import nn

from probes.attention import attention_sites
from quantlab.calibration.calibrator import Calibrator
from quantlab.calibration.statistics import AttentionStats, LinearStats
from quantlab.changes import Change, Changes
from quantlab.config import QuantizeConfig
from quantlab.errors import CalibrationError, SchemeError
from quantlab.kernels.choice import check_integers, check_packed, choose_kernel
from quantlab.layers.fake_quant import FakeQuant
from quantlab.layers.linear import QuantLinear, weight_of
from quantlab.layers.sites import (
    find_outputs,
    find_sites,
    swap_output,
    swap_site,
    turn_heads_,
)
from quantlab.layers.targets import Choice, Target, check_skip, choose_targets, is_skipped
from quantlab.methods.solved import Solved
from quantlab.numerics.block import BlockTensor
from quantlab.numerics.static import Fixed, static_range
from quantlab.records import fingerprint, source_hash
from quantlab.schemes import TRANSFORMS, Scheme, TensorSpec, WeightFormat, check_shapes, check_widths
from quantlab.solutions import SolutionStore
from quantlab.solving import Asked, solve_model, solve_one_by_one
from quantlab.transforms.apply import guard_of, transform_
from quantlab.transforms.bias import correct_bias
from quantlab.transforms.edit import Undo, replace_, restore

__all__ = ["Change", "Changes", "Prepared", "prepared", "quantize_", "quantized"]


@dataclass(frozen=True)
class _Work:
    """What is known of the linears when they are swapped."""

    asked: Asked
    solved: Mapping[str, Solved] = field(default_factory=dict)
    stats: Mapping[str, LinearStats] = field(default_factory=dict)


def quantize_(
    model: nn.Module,
    scheme: Scheme,
    config: QuantizeConfig = QuantizeConfig(),
    *,
    scale_dtype: torch.dtype = torch.float32,
    calibrator: Calibrator | None = None,
    solutions: SolutionStore | None = None,
) -> Changes:
    """Put the scheme on the model, for good.

    Args:
        config: linears that stay at 16 bits, kernel, widths of mixed schemes, settings of methods and transforms.
        scale_dtype: dtype that the scales of weights are rounded to before codes are chosen, as they will be stored.
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
        return _apply(model, Asked(scheme, config, scale_dtype), calibrator, solutions, undo)
    except BaseException:
        restore(undo)
        raise


@contextmanager
def quantized(
    model: nn.Module,
    scheme: Scheme,
    config: QuantizeConfig = QuantizeConfig(),
    *,
    scale_dtype: torch.dtype = torch.float32,
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
        yield _apply(model, Asked(scheme, config, scale_dtype), calibrator, solutions, undo)


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
    stats: Mapping[str, LinearStats]
    """Statistics of inputs, where the scheme needs them."""
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
    scale_dtype: torch.dtype = torch.float32,
    calibrator: Calibrator | None = None,
) -> Iterator[Prepared]:
    """The model with the scheme's transforms for the span of the block, and its codes one linear at a time.

    Takes and raises what `quantize_` does; the codes are the same.
    """
    undo: Undo = []
    asked = Asked(scheme, config, scale_dtype)
    with ExitStack() as stack:
        # Calibration then goes through the attention that `quantized` calibrates with.
        if scheme.sites or scheme.head_sites:
            stack.enter_context(attention_sites(model))
        stack.callback(restore, undo)
        choice = _check(model, asked, calibrator)
        notes, done = _transform_(model, asked, calibrator, undo)
        choice = choose_targets(model, config.skip) if done else choice
        attention = calibrator.attention(model, done) if calibrator and "attention" in scheme.needs else {}
        own = [target for target in choice.chosen if target.tied_to is None]
        solve, stats = solve_one_by_one(model, own, asked, calibrator, done, undo)
        by_name = {target.name: target for target in own}

        def bias(name: str, solved: Solved) -> torch.Tensor | None:
            work = _Work(asked, {name: solved}, stats)
            return _corrected(model.get_submodule(name), by_name[name], work)

        names = tuple(target.name for target in choice.chosen)
        skipped = tuple(target.name for target in choice.skipped)
        yield Prepared(names, skipped, solve, bias, stats, attention, tuple(notes), asked.weights_of)


def _apply(
    model: nn.Module, asked: Asked, calibrator: Calibrator | None, solutions: SolutionStore | None, undo: Undo
) -> Changes:
    """Check, transform, solve, swap; what was replaced is noted in `undo`."""
    scheme = asked.scheme
    choice = _check(model, asked, calibrator)
    find_outputs(model, scheme)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if scheme.is_baseline:
        # What a folder of low-bit weights brought along, see `models.low_bit`; nothing elsewhere.
        carried: tuple[Change, ...] = getattr(model, "carried", ())
        return Changes(scheme.name, carried, num_parameters + sum(row.num_weights for row in carried))
    notes, done = _transform_(model, asked, calibrator, undo)
    if done:
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        choice = choose_targets(model, asked.config.skip) if choice.chosen else choice
    attention = calibrator.attention(model, done) if calibrator and "attention" in scheme.needs else None
    sites = find_sites(model, scheme, attention)
    if sites and {"rotate", "spin"} & set(scheme.transforms):
        assert calibrator is not None
        guard = guard_of(model, calibrator.ids_NT, asked.config.transforms)
        notes += guard.apply("rotate of queries and keys", lambda changes: turn_heads_(sites, changes), undo)
    own = [target for target in choice.chosen if target.tied_to is None]
    solved, stats = solve_model(model, own, asked, calibrator, done, solutions, undo)
    work = _Work(asked, solved, stats)
    chosen = set(choice.chosen)
    # First, since a layer's linears still tell its device.
    at_sites = [swap_site(layer, prefix, site, quantizer, undo) for prefix, layer, site, quantizer in sites]
    rows = [
        _swap_linear(model, target, work, undo) if target in chosen else _stays(target, asked.config.skip)
        for target in choice.targets
    ]
    rows += at_sites
    # Last, since layers are found by what is inside them.
    rows += [
        swap_output(model, module, name, spec, undo) for name, module, spec in find_outputs(model, scheme)
    ]
    return Changes(scheme.name, tuple(rows), num_parameters, tuple(notes))


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


def _check(model: nn.Module, asked: Asked, calibrator: Calibrator | None) -> Choice:
    """Everything that can be told before anything is changed; the linears that are chosen."""
    scheme, config = asked.scheme, asked.config
    carries = any(isinstance(module, QuantLinear | FakeQuant) for module in model.modules())
    if carries and not scheme.is_baseline:
        raise SchemeError(
            "a model takes one scheme at a time: this one carries one already. Load it anew, or the checkpoint that "
            "its folder was made from."
        )
    if scheme.needs and calibrator is None:
        raise SchemeError(
            f"{scheme.name} needs calibration ({', '.join(sorted(scheme.needs))}): none was given. Give a calibrator."
        )
    if config.skip:
        check_skip(model, config.skip)
    if scheme.weights is None and scheme.activations is None:
        return Choice((), (), ())
    choice = choose_targets(model, config.skip)
    _check_linears(model, asked, choice.chosen)
    return choice


def _check_linears(model: nn.Module, asked: Asked, chosen: Sequence[Target]) -> None:
    """Refuse groups that do not divide, widths that match nothing, and integer sums that do not fit."""
    scheme, device = asked.scheme, next(model.parameters()).device
    check_widths(scheme, asked.config.widths, [target.name for target in chosen])
    for target in chosen:
        weights = asked.weights_of(target.name)
        shape = {target.name: (target.shape[0], target.shape[1])}
        check_shapes(Scheme(weights, scheme.activations), shape)
        runs, _ = choose_kernel(weights, scheme.activations, device.type, asked.config.kernel)
        if runs == "int8_mm":
            assert isinstance(weights, TensorSpec) and scheme.activations is not None
            check_integers(weights, scheme.activations, shape, device)
            if asked.config.kernel == "packed" and scheme.method == "hqq":
                raise SchemeError(
                    f"packed kernels need integer zero points where inputs are in low bits: those of {scheme.name} are "
                    "real numbers. Use kernel=integer."
                )
        elif runs in ("int4_packed", "int8_packed"):
            assert isinstance(weights, TensorSpec)
            check_packed(runs, weights, shape)


def _swap_linear(model: nn.Module, target: Target, work: _Work, undo: Undo) -> Change:
    """Put a QuantLinear in the place of one linear, under every name that it has."""
    scheme, dtype = work.asked.scheme, work.asked.scale_dtype
    linear = model.get_submodule(target.name)
    weights = work.asked.weights_of(target.name)
    device = next(linear.parameters(), torch.empty(0)).device
    kernel, reason = choose_kernel(weights, scheme.activations, device.type, work.asked.config.kernel)
    # A matrix of several names has the codes of its first.
    solved = work.solved.get(target.tied_to or target.name)
    if kernel == "int8_mm" and scheme.method == "hqq":
        kernel, reason = "simulated", "zero points of hqq are real numbers"
    assert weights is None or solved is not None, f"{target.name} was not solved"
    storage_bits = 16 * target.num_weights
    if solved is not None:
        storage_bits = 0 if target.tied_to else solved.quantized.storage_bits(8 * dtype.itemsize)
    if not isinstance(linear, QuantLinear):  # a linear that the model holds twice was swapped the first time
        swapped = QuantLinear(
            linear,
            None if solved is None else solved.quantized,
            scheme.activations,
            kernel,
            target.name,
            fixed=_fixed(target.name, work, device),
            bias=_corrected(linear, target, work),
        )
        replace_(model, linear, swapped.train(linear.training), undo)
    why = Scheme(weights, scheme.activations).name
    if weights is not None and solved is not None and scheme.method != "rtn":
        why += f"-{scheme.method}"
    why = ": ".join(filter(None, (why, reason, solved.note if solved else "")))
    bits = 16 if weights is None else weights.bits
    if solved is not None and isinstance(solved.quantized, BlockTensor):
        # Of the type that is stored, which may be another than the one asked for.
        bits = solved.quantized.bits
    return Change(target.name, "swapped", why, bits, target.num_weights, kernel, storage_bits)


def _fixed(name: str, work: _Work, device: torch.device) -> Fixed | None:
    """The range of a linear's inputs under a static spec."""
    spec = work.asked.scheme.activations
    if spec is None or not spec.static:
        return None
    stats = work.stats[name]
    if stats.num_tokens == 0:
        raise CalibrationError(
            f"static scales need inputs that calibration has seen: no token reached {name}. Calibrate on more text, "
            f"leave the 's' out, or add \"*.{name.rpartition('.')[2]}\" to skip."
        )
    low, high = static_range(spec, stats.minimum_I, stats.maximum_I)
    return low.to(device), high.to(device)


def _corrected(linear: nn.Module, target: Target, work: _Work) -> torch.Tensor | None:
    """The linear's bias with what makes up for the mean error of its weights; None leaves it as it is."""
    solved = work.solved.get(target.tied_to or target.name)
    if "bias" not in work.asked.scheme.transforms or solved is None:
        return None
    mean_I = work.stats[target.name].to(weight_of(linear).device).mean_I
    return correct_bias(weight_of(linear), solved.quantized.dequantize(), linear.bias, mean_I)  # type: ignore[arg-type]


def _stays(target: Target, skip: Sequence[str]) -> Change:
    """The row of a matrix that stays at 16 bits."""
    reasons = {
        "outside": "outside the decoder layers (embeddings and lm_head stay at 16 bits)",
        "other": "not a linear",
    }
    why = "skip" if is_skipped(target, skip) else reasons.get(target.sort, "")
    if target.tied_to:
        why += f"; tied to {target.tied_to}"
    in_decoder = target.sort != "outside"
    return Change(
        target.name, "skipped", why, 16, target.num_weights, "", 16 * target.num_weights, in_decoder
    )

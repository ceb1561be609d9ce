"""Solving: codes for every linear that a scheme quantizes, layer by layer, with the statistics that its method needs.

`solve_model` takes the way that the method asks for:

    solve               each matrix by itself, or with the statistics of one calibration of the 16-bit model
    solve_together      the same for several schemes of one method at once: GPTQ shares one factorization
    solve_sequential    each layer sees inputs that come out of layers that were quantized already

A linear's grid is the scheme's, or where the scheme is `mixed` that of the last pattern of `widths` that matches it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from probes.hooks import watch
from quantlab.calibration.calibrator import Calibrator
from quantlab.calibration.statistics import LinearStats
from quantlab.calibration.stream import BlockStep, batches, walk_blocks
from quantlab.calibration.watcher import Watcher
from quantlab.config import QuantizeConfig
from quantlab.errors import SchemeError
from quantlab.layers.linear import weight_of
from quantlab.layers.targets import Target
from quantlab.methods import awq, clip, gptq, hqq, rtn
from quantlab.methods.autoround import tune_layer
from quantlab.methods.config import MethodConfig
from quantlab.methods.formats import quantize_format
from quantlab.methods.solved import Solved
from quantlab.schemes import METHODS, Scheme, TensorSpec, WeightFormat, weights_of
from quantlab.solutions import SolutionStore
from quantlab.transforms.activation_aware import scale_inputs_
from quantlab.transforms.apply import guard_of
from quantlab.transforms.edit import Undo, restore, set_matrix_

__all__ = [
    "QUANTIZERS",
    "Asked",
    "solve",
    "solve_model",
    "solve_one_by_one",
    "solve_sequential",
    "solve_together",
]


class Quantizer(Protocol):
    """The signature that methods of single matrices share."""

    def __call__(
        self,
        weight_OI: Tensor,
        specs: Sequence[TensorSpec],
        stats: LinearStats | None,
        *,
        scale_dtype: torch.dtype,
        config: MethodConfig,
    ) -> list[Solved]:
        """One result for each spec."""


QUANTIZERS: dict[str, Quantizer] = {
    "rtn": rtn.quantize_weights,
    "clip": clip.quantize_weights,
    "wclip": clip.quantize_weights_by_inputs,
    "gptq": gptq.quantize_weights,
    "awq": awq.quantize_weights,
    "hqq": hqq.quantize_weights,
}
"""Method -> what quantizes one matrix; autoround works on whole layers."""

Stats = Mapping[str, LinearStats]


@dataclass(frozen=True)
class Asked:
    """What is asked of a model's linears."""

    scheme: Scheme
    config: QuantizeConfig
    scale_dtype: torch.dtype = torch.float32

    def weights_of(self, name: str) -> TensorSpec | WeightFormat | None:
        """The grid of one linear; None where it stays at 16 bits."""
        return weights_of(name, self.scheme, self.config.widths)


def solve_model(
    model: nn.Module,
    targets: Sequence[Target],
    asked: Asked,
    calibrator: Calibrator | None,
    done: str,
    store: SolutionStore | None,
    undo: Undo,
) -> tuple[dict[str, Solved], Stats]:
    """Codes of every target that is not to stay at 16 bits, and the statistics that they were found with.

    Args:
        model: as the transforms of `done` have left it; AWQ's scales change it, which is noted in `undo`.
        targets: linears of the decoder layers.
        calibrator: where the scheme needs one.
        store: keeps codes that took long.

    Raises:
        SchemeError: what the method says, with the name of the linear.
        CalibrationError: the text or the model cannot be calibrated.
    """
    scheme = asked.scheme
    stats: Stats = calibrator.linears(model, done) if calibrator and "inputs" in scheme.needs else {}
    if scheme.weights is None or not targets:
        return {}, stats
    if scheme.method == "awq":
        assert calibrator is not None
        stats = _scale_for_awq_(model, targets, asked, calibrator, stats, undo)
    if _is_layerwise(asked):
        assert calibrator is not None
        walk = (calibrator.ids_NT, calibrator.batch_size, calibrator.accumulate)
        return _kept(store, asked, lambda: solve_sequential(model, targets, asked, *walk)), stats
    if scheme.method == "gptq" and store is not None:
        return _kept_together(model, targets, asked, stats, store), stats
    return solve(model, targets, asked, _read(asked, stats)), stats


def solve_one_by_one(
    model: nn.Module,
    targets: Sequence[Target],
    asked: Asked,
    calibrator: Calibrator | None,
    done: str,
    undo: Undo,
) -> tuple[Callable[[str], Solved], Stats]:
    """As `solve_model`, but codes of a linear are found when its name is given, so that few are in memory at a time.

    Methods that learn whole layers find all codes at once.
    """
    if _is_layerwise(asked):
        solved, stats = solve_model(model, targets, asked, calibrator, done, None, undo)
        return solved.__getitem__, stats
    stats = calibrator.linears(model, done) if calibrator and "inputs" in asked.scheme.needs else {}
    if asked.scheme.method == "awq":
        assert calibrator is not None
        stats = _scale_for_awq_(model, targets, asked, calibrator, stats, undo)
    by_name = {target.name: target for target in targets}
    read = _read(asked, stats)
    return lambda name: solve(model, [by_name[name]], asked, read)[name], stats


def _is_layerwise(asked: Asked) -> bool:
    """Whether codes of a layer need those of the layers before it, or are learned together."""
    method = asked.scheme.method
    sequential = asked.config.methods.hessian == "sequential" and "inputs" in METHODS[method].needs
    return method == "autoround" or sequential


def _read(asked: Asked, stats: Stats) -> Stats:
    """Statistics that the method reads; others are not read from disk either."""
    return stats if "inputs" in METHODS[asked.scheme.method].needs else {}


def _kept(
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


def _kept_together(
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
        yield target.name, _solve_linear(model.get_submodule(target.name), target.name, asked, stats)


def _scale_for_awq_(
    model: nn.Module,
    targets: Sequence[Target],
    asked: Asked,
    calibrator: Calibrator,
    stats: Stats,
    undo: Undo,
) -> Stats:
    """AWQ's scales on the model, and the statistics of what they leave of the inputs."""
    specs = {target.name: asked.weights_of(target.name) for target in targets}
    grids = {name: spec for name, spec in specs.items() if isinstance(spec, TensorSpec)}
    scaled: list[Stats] = []

    def scale(changes: Undo) -> list[str]:
        how = {"scale_dtype": asked.scale_dtype, "config": asked.config.methods}
        scaled.append(scale_inputs_(model, grids, stats, changes, **how))  # type: ignore[arg-type]
        return []

    guard_of(model, calibrator.ids_NT, asked.config.transforms).apply("awq", scale, undo)
    return scaled[0]


def solve_sequential(
    model: nn.Module,
    targets: Sequence[Target],
    asked: Asked,
    ids_NT: Tensor,
    batch_size: int = 8,
    accumulate: torch.dtype = torch.float32,
) -> dict[str, Solved]:
    """Codes of every target, each layer calibrated on inputs that come out of quantized layers.

    The model is as before afterwards. Rounding by gradients (autoround) aims at the layer's own 16-bit outputs; with
    `hessian: shared` its inputs are those of the 16-bit model.
    """
    undo: Undo = []
    solved: dict[str, Solved] = {}
    learned = asked.scheme.method == "autoround"
    try:
        for step in walk_blocks(model, ids_NT, batch_size=batch_size):
            inside = [target.name for target in targets if target.name.startswith(f"{step.name}.")]
            found = (
                _learn(step, inside, asked, batch_size)
                if learned
                else _calibrate(model, step, inside, asked, batch_size, accumulate)
            )
            solved |= found
            if asked.config.methods.hessian == "sequential":
                for name, each in found.items():
                    _put_in(model, name, each, undo)
                step.outputs_NTD = None
    finally:
        restore(undo)
    return {target.name: solved[target.name] for target in targets if target.name in solved}


def _calibrate(
    model: nn.Module,
    step: BlockStep,
    names: Sequence[str],
    asked: Asked,
    batch_size: int,
    accumulate: torch.dtype,
) -> dict[str, Solved]:
    """Codes of one layer's linears from the inputs that they see now."""
    watcher = Watcher(step, names, (), accumulate)
    with watch(step.layer, watcher.places, watcher.see), torch.no_grad():
        for start, stop in batches(len(step.inputs_NTD), batch_size):
            step.run(start, stop)
    stats = watcher.result(step.name).linears
    found = {name: _solve_linear(model.get_submodule(name), name, [asked], stats)[0] for name in names}
    return {name: solved for name, solved in found.items() if solved is not None}


def _learn(step: BlockStep, names: Sequence[str], asked: Asked, batch_size: int) -> dict[str, Solved]:
    """Codes of one layer's linears by autoround."""
    prefix = f"{step.name}."
    specs = {name.removeprefix(prefix): asked.weights_of(name) for name in names}
    grids = {name: spec for name, spec in specs.items() if isinstance(spec, TensorSpec)}
    if not grids:
        return {}
    wanted_NTD = torch.empty_like(step.inputs_NTD)
    with torch.no_grad():
        for start, stop in batches(len(wanted_NTD), batch_size):
            wanted_NTD[start:stop] = step.run(start, stop).cpu()
    found = tune_layer(
        step.layer,
        grids,
        lambda numbers: step.run_on(step.inputs_NTD[list(numbers)]),
        wanted_NTD,
        config=asked.config.methods.autoround,
        scale_dtype=asked.scale_dtype,
    )
    step.outputs_NTD = wanted_NTD
    return {prefix + name: solved for name, solved in found.items()}


def _solve_linear(linear: nn.Module, name: str, asked: Sequence[Asked], stats: Stats) -> list[Solved | None]:
    """One linear under each scheme; those on uniform grids go to the method in one call."""
    grids = [each.weights_of(name) for each in asked]
    weight_OI = weight_of(linear).detach()
    first = asked[0]
    specs = [grid for grid in grids if isinstance(grid, TensorSpec)]
    quantizer, dtype = QUANTIZERS[first.scheme.method], first.scale_dtype
    seen = stats.get(name)
    known = None if seen is None else seen.to(weight_OI.device)
    try:
        on_grids = (
            quantizer(weight_OI, specs, known, scale_dtype=dtype, config=first.config.methods)
            if specs
            else []
        )
        rest = iter(on_grids)
        return [
            next(rest)
            if isinstance(grid, TensorSpec)
            else None
            if grid is None
            else quantize_format(weight_OI, grid, scale_dtype=dtype, name=name)
            for grid in grids
        ]
    except SchemeError as error:
        if name not in str(error):
            error.add_note(f"in {name}")
        raise


def _put_in(model: nn.Module, name: str, solved: Solved, undo: Undo) -> None:
    """Give a linear the weights that its codes stand for."""
    set_matrix_(model, name, solved.quantized.dequantize().double(), undo)

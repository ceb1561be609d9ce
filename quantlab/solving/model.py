"""A model's codes, by the way that its method asks for."""

from collections.abc import Callable, Sequence

from torch import nn

from quantlab.calibration.calibrator import Calibrator
from quantlab.layers.targets import Target
from quantlab.methods.solved import Solved
from quantlab.schemes import METHODS, TensorSpec
from quantlab.solutions import SolutionStore
from quantlab.solving.asked import Asked
from quantlab.solving.kept import kept, kept_together
from quantlab.solving.linear import Stats
from quantlab.solving.seen import Inputs, seen_behind_codes
from quantlab.solving.sequential import solve_sequential
from quantlab.solving.together import solve
from quantlab.transforms.activation_aware import scale_inputs_
from quantlab.transforms.apply import guard_of
from quantlab.transforms.edit import Undo

__all__ = ["solve_model", "solve_one_by_one"]


def solve_model(
    model: nn.Module,
    targets: Sequence[Target],
    asked: Asked,
    calibrator: Calibrator | None,
    done: str,
    store: SolutionStore | None,
    undo: Undo,
) -> tuple[dict[str, Solved], Inputs]:
    """Codes of every target that is not to stay at 16 bits, and what biases and static scales are made of.

    Args:
        model: as the transforms of `done` have left it; AWQ's scales change it, which is noted in `undo`.
        targets: linears of the decoder layers.
        calibrator: where the scheme needs one.
        store: keeps codes that took long.

    Raises:
        SchemeError: what the method says, with the name of the linear.
        CalibrationError: the text or the model cannot be calibrated.
    """
    stats = _statistics(model, targets, asked, calibrator, done, undo)
    if asked.scheme.weights is None or not targets:
        return {}, stats
    solved = _solve(model, targets, asked, calibrator, stats, store)
    return solved, _inputs(model, solved.get, asked, calibrator, stats)


def solve_one_by_one(
    model: nn.Module,
    targets: Sequence[Target],
    asked: Asked,
    calibrator: Calibrator | None,
    done: str,
    undo: Undo,
) -> tuple[Callable[[str], Solved], Inputs]:
    """As `solve_model`, but codes of a linear are found when its name is given, so that few are in memory at a time.

    Methods that learn whole layers find all codes at once.
    """
    if _is_layerwise(asked):
        solved, inputs = solve_model(model, targets, asked, calibrator, done, None, undo)
        return solved.__getitem__, inputs
    stats = _statistics(model, targets, asked, calibrator, done, undo)
    by_name = {target.name: target for target in targets}
    read = _read(asked, stats)

    def codes(name: str) -> Solved | None:
        return solve(model, [by_name[name]], asked, read).get(name) if name in by_name else None

    inputs = _inputs(model, codes, asked, calibrator, stats)
    return lambda name: solve(model, [by_name[name]], asked, read)[name], inputs


def _statistics(
    model: nn.Module,
    targets: Sequence[Target],
    asked: Asked,
    calibrator: Calibrator | None,
    done: str,
    undo: Undo,
) -> Stats:
    """Statistics of the 16-bit model where the scheme needs them, AWQ's scales made on it."""
    stats: Stats = calibrator.linears(model, done) if calibrator and "inputs" in asked.scheme.needs else {}
    if asked.scheme.method != "awq" or not targets:
        return stats
    assert calibrator is not None
    return _scale_for_awq_(model, targets, asked, calibrator, stats, undo)


def _solve(
    model: nn.Module,
    targets: Sequence[Target],
    asked: Asked,
    calibrator: Calibrator | None,
    stats: Stats,
    store: SolutionStore | None,
) -> dict[str, Solved]:
    """Codes by the way that the method asks for."""
    if _is_layerwise(asked):
        assert calibrator is not None
        walk = (calibrator.ids_NT, calibrator.batch_size, calibrator.accumulate)
        return kept(store, asked, lambda: solve_sequential(model, targets, asked, *walk))
    if asked.scheme.method == "gptq" and store is not None:
        return kept_together(model, targets, asked, stats, store)
    return solve(model, targets, asked, _read(asked, stats))


def _inputs(
    model: nn.Module,
    codes: Callable[[str], Solved | None],
    asked: Asked,
    calibrator: Calibrator | None,
    stats: Stats,
) -> Inputs:
    """What biases and static scales are made of: statistics of the 16-bit model, or of what quantized layers give."""
    scheme = asked.scheme
    if asked.config.methods.hessian == "shared" or scheme.weights is None or not scheme.reads_inputs:
        return stats
    assert calibrator is not None
    return seen_behind_codes(model, codes, calibrator, correct="bias" in scheme.transforms)


def _is_layerwise(asked: Asked) -> bool:
    """Whether codes of a layer need those of the layers before it, or are learned together."""
    method = asked.scheme.method
    sequential = asked.config.methods.hessian == "sequential" and "inputs" in METHODS[method].needs
    return method == "autoround" or sequential


def _read(asked: Asked, stats: Stats) -> Stats:
    """Statistics that the method reads; others are not read from disk either."""
    return stats if "inputs" in METHODS[asked.scheme.method].needs else {}


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

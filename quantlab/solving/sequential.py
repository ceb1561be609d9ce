"""Layer by layer: each layer's codes are found on inputs that come out of layers that were quantized already.

Letters: N sequences, T tokens, D hidden channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probes.hooks import watch
from quantlab.calibration.collect import check_weights
from quantlab.calibration.stream import BlockStep, batches, walk_blocks
from quantlab.calibration.watcher import Watcher
from quantlab.layers.targets import Target
from quantlab.methods.autoround import tune_layer
from quantlab.methods.needs import shortage
from quantlab.methods.solved import Solved
from quantlab.schemes import TensorSpec
from quantlab.solving.asked import Asked
from quantlab.solving.linear import solve_linear
from quantlab.transforms.edit import Undo, restore, set_matrix_

__all__ = ["solve_sequential"]


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
    found = {name: solve_linear(model.get_submodule(name), name, [asked], stats)[0] for name in names}
    return {name: solved for name, solved in found.items() if solved is not None}


def _learn(step: BlockStep, names: Sequence[str], asked: Asked, batch_size: int) -> dict[str, Solved]:
    """Codes of one layer's linears by autoround."""
    prefix = f"{step.name}."
    specs = {name.removeprefix(prefix): asked.weights_of(name) for name in names}
    grids = {name: spec for name, spec in specs.items() if isinstance(spec, TensorSpec)}
    if not grids:
        return {}
    check_weights(step)
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
        name=step.name,
    )
    step.outputs_NTD = wanted_NTD
    num_tokens = step.inputs_NTD.shape[:2].numel()
    return {
        prefix + name: solved.noted(shortage("autoround", num_tokens, solved.quantized.codes.shape[1]))
        for name, solved in found.items()
    }


def _put_in(model: nn.Module, name: str, solved: Solved, undo: Undo) -> None:
    """Give a linear the weights that its codes stand for."""
    set_matrix_(model, name, solved.quantized.dequantize().double(), undo)

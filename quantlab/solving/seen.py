"""What each linear sees once the layers before it are quantized: extremes and means of its inputs, without X^T X.

Corrected biases and static scales read them under `hessian: sequential`. The text walks through the decoder layers; in
each one, linears have the weights that their codes stand for while their inputs are noted. Where biases are corrected,

    b' = b + (W - W_hat) E[x]

depends on what a linear sees, and moves what the linears after it see. So the layer is run until no bias changes: the
first linear's is right after one run, that of the linears that read its output after two, and so on. Layers after it
get the outputs of the last run. Inputs are not rounded here, and only one layer is changed at a time.

Letters: N sequences, T tokens, D hidden channels; O outputs, I inputs of a linear.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probes.hooks import watch
from quantlab.calibration.accumulators import RangeSums
from quantlab.calibration.calibrator import Calibrator
from quantlab.calibration.statistics import LinearStats
from quantlab.calibration.stream import BlockStep, batches, walk_blocks
from quantlab.layers.linear import weight_of
from quantlab.layers.targets import Target, find_targets
from quantlab.methods.solved import Solved
from quantlab.transforms.bias import correct_bias
from quantlab.transforms.edit import Undo, restore, set_bias_, set_matrix_

__all__ = ["Inputs", "SeenInputs", "seen_behind_codes"]


@dataclass(frozen=True)
class SeenInputs:
    """Extremes and mean of each channel of a linear's inputs; all 0 where no token reached it."""

    minimum_I: Tensor
    """Smallest value of each channel, float32."""
    maximum_I: Tensor
    """Largest value of each channel, float32."""
    mean_I: Tensor
    """Mean of each channel, float32."""
    num_tokens: int
    """Tokens that were seen."""


Inputs = Mapping[str, LinearStats | SeenInputs]
"""What biases and static scales are made of, by the linear's dotted name."""


def seen_behind_codes(
    model: nn.Module, codes: Callable[[str], Solved | None], calibrator: Calibrator, *, correct: bool
) -> dict[str, SeenInputs]:
    """What every linear of the decoder layers sees where all of them are quantized; the model is as before afterwards.

    Args:
        codes: of a linear, by the first name of its matrix; None where it stays at 16 bits.
        calibrator: the text.
        correct: whether linears with codes have corrected biases.

    Raises:
        CalibrationError: inputs that are not finite, or a model that cannot be walked.
    """
    linears = [target for target in find_targets(model) if target.sort == "linear"]
    found: dict[str, SeenInputs] = {}
    for step in walk_blocks(model, calibrator.ids_NT, batch_size=calibrator.batch_size):
        inside = [target for target in linears if target.name.startswith(f"{step.name}.")]
        undo: Undo = []
        try:
            errors = _put_in(model, inside, codes, undo)
            found |= _settled(model, step, inside, errors if correct else {}, calibrator.batch_size, undo)
        finally:
            restore(undo)
    return found


@dataclass(frozen=True)
class _Error:
    """A linear as it was, and the matrix that it multiplies by now."""

    linear: nn.Module
    quantized_OI: Tensor

    def bias(self, mean_I: Tensor) -> Tensor:
        """The bias that makes up for the difference."""
        weight_OI, bias_O = weight_of(self.linear).detach(), self.linear.bias
        return correct_bias(weight_OI, self.quantized_OI, bias_O, mean_I.to(weight_OI.device))  # type: ignore[arg-type]


def _put_in(
    model: nn.Module, inside: Sequence[Target], codes: Callable[[str], Solved | None], undo: Undo
) -> dict[str, _Error]:
    """Give a layer's linears the weights that their codes stand for."""
    solved = {target.name: codes(target.tied_to or target.name) for target in inside}
    errors = {}
    for name, each in solved.items():
        if each is not None:
            errors[name] = _Error(model.get_submodule(name), each.quantized.dequantize())
            set_matrix_(model, name, errors[name].quantized_OI.double(), undo)
    return errors


def _settled(
    model: nn.Module,
    step: BlockStep,
    inside: Sequence[Target],
    errors: Mapping[str, _Error],
    batch_size: int,
    undo: Undo,
) -> dict[str, SeenInputs]:
    """What a layer's linears see once their biases are corrected for it; the layer's outputs are those of that run."""
    biases: dict[str, Tensor] = {}
    # Each run settles at least the first linear that was not; one more shows that all are.
    for _ in range(len(inside) + 1):
        seen = _run(step, inside, batch_size)
        wanted = {name: error.bias(seen[name].mean_I) for name, error in errors.items()}
        changed = [
            name for name in wanted if name not in biases or not torch.equal(wanted[name], biases[name])
        ]
        if not changed:
            break
        for name in changed:
            set_bias_(model, name, wanted[name], undo)
        biases = wanted
    return seen


@torch.no_grad()
def _run(step: BlockStep, inside: Sequence[Target], batch_size: int) -> dict[str, SeenInputs]:
    """Send the text through a layer as it is now; its inputs stay, for another run."""
    prefix = f"{step.name}."
    sums = {target.name.removeprefix(prefix): _Sums(target) for target in inside}
    outputs_NTD = torch.empty_like(step.inputs_NTD)

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        # What meets the weights: a rotated linear rotates its inputs first.
        before = getattr(module, "before", None)
        sums[name].add(args[0] if before is None else before(args[0]))

    with watch(step.layer, list(sums), see):
        for start, stop in batches(len(outputs_NTD), batch_size):
            outputs_NTD[start:stop] = step.run(start, stop).cpu()
    step.outputs_NTD = outputs_NTD
    return {prefix + name: each.result() for name, each in sums.items()}


class _Sums:
    """Running extremes and means of one linear's inputs."""

    def __init__(self, target: Target) -> None:
        self.extremes = RangeSums(f"the input of {target.name}")
        self.total_I = torch.zeros(target.shape[1], dtype=torch.float64)
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Take the inputs [.., I] of one call."""
        x_MI = x.reshape(-1, x.shape[-1])
        if len(x_MI):
            self.extremes.add(x_MI[None, None])
            self.total_I += x_MI.sum(0, dtype=torch.float64).cpu()
            self.num_tokens += len(x_MI)

    def result(self) -> SeenInputs:
        """On the CPU."""
        mean_I = (self.total_I / max(self.num_tokens, 1)).float()
        if not self.extremes.has_seen:
            return SeenInputs(mean_I, mean_I, mean_I, 0)
        ends = self.extremes.result()
        return SeenInputs(ends.minimum_HC[0], ends.maximum_HC[0], mean_I, self.num_tokens)

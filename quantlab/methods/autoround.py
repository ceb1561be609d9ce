"""AutoRound: rounding learned by signed gradients, so that a decoder layer's output stays what it was.

Of each linear three things are learned: an offset V of every weight before rounding, in [-1/2, 1/2], and two factors
a, b of its group's range, in [1/2, 1]:

    codes = clip(round(W / s + V) + z),  s and z from the range [b min, a max] of the group

The loss is the mean squared error of the layer's output, its inputs fixed. A step moves every value by the learning
rate against the sign of its gradient; round counts as the identity in the backward pass. The step size falls linearly
to 0, and the best codes that were seen are kept; the first are those of round to nearest, so the result is never worse
on the sequences that are compared.

Source: Cheng et al. 2023, arXiv:2309.05516, algorithm 1. O outputs, I inputs, N sequences, T tokens, D channels.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.errors import SchemeError
from quantlab.layers.linear import weight_of
from quantlab.methods.config import AutoRoundConfig
from quantlab.methods.grouped import grouped
from quantlab.methods.rtn import quantize_weight
from quantlab.methods.solved import Solved
from quantlab.numerics.affine import QuantizedTensor, choose_qparams
from quantlab.numerics.qtype import QType
from quantlab.schemes import TensorSpec
from quantlab.transforms.edit import Undo, replace_, restore

__all__ = ["tune_layer"]

_COMPARED = 16
"""Sequences at most on which codes are compared; a step's own batch is too noisy to choose by."""
_EVERY = 10
"""Steps between two comparisons."""


def tune_layer(
    layer: nn.Module,
    specs: Mapping[str, TensorSpec],
    run: Callable[[Sequence[int]], Tensor],
    wanted_NTD: Tensor,
    *,
    config: AutoRoundConfig,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "layer",
) -> dict[str, Solved]:
    """Codes of a decoder layer's linears; the layer itself is as before afterwards.

    Args:
        specs: name within the layer -> grid of that linear's weights.
        run: output [n, T, D] of the sequences with these numbers, by the layer as it is.
        wanted_NTD: the outputs that are aimed at.
        config: steps, batch and step size.
        scale_dtype: dtype that scales are rounded to before codes are chosen.
        name: the layer's dotted name, for messages.

    Raises:
        SchemeError: as `rtn.quantize_weight`; the output is not finite.
    """
    N = len(wanted_NTD)
    rate = config.learning_rate or 1 / config.num_steps
    generator = torch.Generator().manual_seed(config.seed)
    compared = torch.randperm(N, generator=generator)[:_COMPARED].tolist()
    with torch.enable_grad(), _learning(layer, specs, scale_dtype, name) as learners:
        # Only now, since building the learners names weights that are not finite.
        num_bad = int((~wanted_NTD.isfinite()).sum())
        if num_bad:
            raise _not_finite(f"that of {name} holds {num_bad} NaN or Inf among {wanted_NTD.numel()} values")
        best = _Best(name, learners)
        for step in range(config.num_steps + 1):
            if step % _EVERY == 0 or step == config.num_steps:
                best.offer(_error(run, wanted_NTD, compared, config.batch_size), step)
            if step < config.num_steps:
                batch = torch.randperm(N, generator=generator)[: config.batch_size].tolist()
                _move_(learners.values(), _loss(run, wanted_NTD, batch), rate * (1 - step / config.num_steps))
    note = f"autoround: output error {best.least / best.first:.3f} of rtn's" if best.first else ""
    return {name: Solved(codes, note) for name, codes in best.codes.items()}


class _Learner(nn.Module):
    """A linear whose weights are rounded with learned offsets and ranges, in the forward pass."""

    def __init__(self, linear: nn.Module, spec: TensorSpec, scale_dtype: torch.dtype) -> None:
        super().__init__()
        weight_OI = weight_of(linear).detach().float()
        self.linear, self.spec, self.scale_dtype = linear, spec, scale_dtype
        self.before = getattr(linear, "before", None)
        self.groups, self.qtype = grouped(weight_OI, spec), QType.of_weights(spec)
        self.offset = nn.Parameter(torch.zeros_like(self.groups.view))
        self.factors = nn.ParameterList(torch.ones_like(self.groups.low) for _ in range(2))

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale, rounded to its stored dtype but with the gradient of the factors, and zero point."""
        low, high = self.groups.low * self.factors[0], self.groups.high * self.factors[1]
        if self.spec.symmetric:
            # One scale cannot follow two ends: the second factor moves both.
            low = -high
        else:
            # As `choose_qparams` widens it; an end that is moved to 0 has nothing to learn.
            low, high = low.clamp(max=0), high.clamp(min=0)
        with torch.no_grad():
            scale, zero_point = choose_qparams(low, high, self.qtype, self.scale_dtype)
        exact = high / self.qtype.qmax if self.spec.symmetric else (high - low) / self.qtype.qmax
        return exact + (scale - exact).detach(), zero_point

    def codes(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Real-valued codes that round to integers in value and pass gradients as they are."""
        shifted = self.groups.view / scale + self.offset
        if zero_point is not None:
            shifted = shifted + zero_point
        clipped = shifted.clamp(self.qtype.qmin, self.qtype.qmax)
        return clipped + (clipped.round() - clipped).detach()

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] to [.., O]."""
        x = x if self.before is None else self.before(x)
        scale, zero_point = self.grid()
        codes = self.codes(scale, zero_point)
        real = (codes if zero_point is None else codes - zero_point) * scale
        weight_OI = real.reshape(weight_of(self.linear).shape).to(x.dtype)
        return F.linear(x, weight_OI, self.linear.bias)  # type: ignore[arg-type]

    @property
    def bounded(self) -> list[tuple[nn.Parameter, float, float]]:
        """What is learned, each with its bounds."""
        return [(self.offset, -0.5, 0.5), *((factor, 0.5, 1.0) for factor in self.factors)]

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """The codes as they are now."""
        scale, zero_point = self.grid()
        codes = self.codes(scale, zero_point).round().to(self.qtype.dtype)
        return self.groups.of_codes(codes, scale, zero_point)


def _loss(run: Callable[[Sequence[int]], Tensor], wanted_NTD: Tensor, numbers: Sequence[int]) -> Tensor:
    """What is learned from; where it or its gradient overflows, NaN has the sign 0 and moves nothing."""
    outputs = run(numbers).float()
    return F.mse_loss(outputs, wanted_NTD[list(numbers)].to(outputs.device).float())


def _move_(learners: Iterable[_Learner], loss: Tensor, rate: float) -> None:
    """One step of everything that is learned against the sign of its gradient, within the bounds.

    Gradients are asked for, not accumulated: the model's own parameters get none.
    """
    bounded = [each for learner in learners for each in learner.bounded]
    gradients = torch.autograd.grad(loss, [parameter for parameter, _, _ in bounded], allow_unused=True)
    with torch.no_grad():
        for (parameter, low, high), gradient in zip(bounded, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(rate * gradient.sign()).clamp_(low, high)


@dataclass
class _Best:
    """The codes with the least error that were seen."""

    name: str
    learners: Mapping[str, _Learner]
    least: float = 0.0
    first: float = 0.0

    def offer(self, error: float, step: int) -> None:
        """Keep the codes as they are now where they are better."""
        if step == 0:
            if not math.isfinite(error):
                raise _not_finite(f"that of {self.name} is not with its weights rounded to nearest")
            self.first = self.least = error
            self.codes = {
                name: quantize_weight(weight_of(each.linear), each.spec, scale_dtype=each.scale_dtype)
                for name, each in self.learners.items()
            }
        elif error < self.least:
            self.least = error
            self.codes = {name: learner.quantized() for name, learner in self.learners.items()}


@torch.no_grad()
def _error(
    run: Callable[[Sequence[int]], Tensor], wanted_NTD: Tensor, numbers: Sequence[int], size: int
) -> float:
    """Mean squared error of the outputs of these sequences; finite where they are: float64 holds squares of float32."""
    total = 0.0
    for start in range(0, len(numbers), size):
        part = list(numbers[start : start + size])
        outputs = run(part)
        wanted = wanted_NTD[part].to(outputs.device)
        total += float((outputs.double() - wanted.double()).square().mean()) * len(part)
    return total / len(numbers)


def _not_finite(what: str) -> SchemeError:
    return SchemeError(
        f"the output of every layer must be finite to learn its rounding: {what}. Use a wider dtype (--dtype float32), "
        "or a method without data: rtn, clip, hqq."
    )


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    """Complaints about a matrix go with its name."""
    try:
        yield
    except SchemeError as error:
        error.add_note(f"in {name}")
        raise


@contextmanager
def _learning(
    layer: nn.Module, specs: Mapping[str, TensorSpec], scale_dtype: torch.dtype, layer_name: str
) -> Iterator[dict[str, _Learner]]:
    """The layer with learners in the place of its linears, for the span of the block."""
    undo: Undo = []
    learners: dict[str, _Learner] = {}
    try:
        for name, spec in specs.items():
            linear = layer.get_submodule(name)
            with _said_of(f"{layer_name}.{name}"):
                learners[name] = _Learner(linear, spec, scale_dtype)
                learners[name].grid()
            replace_(layer, linear, learners[name], undo)
        yield learners
    finally:
        restore(undo)

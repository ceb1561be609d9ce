"""One pass over text: for every linear the statistics of its inputs, for every attention layer the ranges of q, k, v.

Of a linear with inputs x (rows of X, one a token):

    gram = X^T X = sum over tokens of x x^T        the Hessian of |W x - W' x|^2 is 2 X^T X
    minimum, maximum, mean of each channel, and the number of tokens

Products are summed in float32 (never TF32 or bfloat16) or in float64, means in float64. Linears that read one tensor
(q, k, v; gate, up) are seen as such and share one Gram matrix, so there is one for each distinct input.

Letters: N sequences, T tokens, B sequences of a batch, H heads, C channels of a head, I inputs of a linear.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probes.attention import attention_sites
from probes.errors import ProbeError
from probes.hooks import watch
from probes.sites import attention_layers, decoder_layers
from quantlab.calibration.accumulators import InputSums, RangeSums, unseen
from quantlab.calibration.statistics import AttentionStats, LinearStats
from quantlab.calibration.stream import BlockStep, Source, batches, walk_blocks
from quantlab.errors import CalibrationError
from quantlab.layers.targets import find_targets

__all__ = ["BlockStats", "Calibration", "Watcher", "calibrate", "collect_blocks"]

_SITES = ("attn_query", "attn_key", "attn_value")
"""What enters the attention product, in the order of AttentionStats."""


@dataclass(frozen=True)
class BlockStats:
    """Statistics of one decoder layer."""

    name: str
    linears: Mapping[str, LinearStats]
    """By the linear's dotted name; one that no token reached has num_tokens 0."""
    attention: Mapping[str, AttentionStats]
    """By the attention layer's dotted name; empty where its attention has no sites."""


@dataclass(frozen=True)
class Calibration:
    """Statistics of a whole model."""

    ids_NT: Tensor
    """The tokens that were seen, int64."""
    linears: Mapping[str, LinearStats]
    """By the linear's dotted name; those of a cache are read when they are asked for."""
    attention: Mapping[str, AttentionStats]
    """By the attention layer's dotted name; empty where its attention has no sites."""
    key: str = ""
    """Hash of what made it, where it was stored."""


def calibrate(
    model: nn.Module,
    ids_NT: Tensor,
    *,
    batch_size: int = 8,
    accumulate: torch.dtype = torch.float32,
    source: Source | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Calibration:
    """Statistics of a model that is small enough to hold them all in memory; `cache.calibrated` is for the others.

    Arguments and errors are those of `collect_blocks`.
    """
    linears: dict[str, LinearStats] = {}
    attention: dict[str, AttentionStats] = {}
    for block in collect_blocks(
        model, ids_NT, batch_size=batch_size, accumulate=accumulate, source=source, advance=advance
    ):
        linears |= block.linears
        attention |= block.attention
    return Calibration(ids_NT, linears, attention)


def collect_blocks(
    model: nn.Module,
    ids_NT: Tensor,
    *,
    batch_size: int = 8,
    accumulate: torch.dtype = torch.float32,
    source: Source | None = None,
    is_known: Callable[[str], bool] = lambda name: False,
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[BlockStats]:
    """Statistics block by block, first layer first.

    Args:
        model: a causal LM in eval mode.
        batch_size: sequences in a call.
        accumulate: float32 or float64, of the sums of products.
        source: lends the weights of a model that is on the meta device.
        is_known: whether the statistics of a layer are there already; it is only run then, and left out.
        advance: called with the number of sequences whenever they have gone through a layer.

    Raises:
        CalibrationError: NaN or Inf in weights or activations (the first tensor is named), squares that overflow,
            no text, or an architecture that cannot be walked.
    """
    parts = [(0, len(ids_NT))]
    for step, watchers in watched_steps(
        model, ids_NT, parts, batch_size, accumulate, source, is_known, advance
    ):
        if watchers:
            yield watchers[0].result(step.name)


def watched_steps(
    model: nn.Module,
    ids_NT: Tensor,
    parts: Sequence[tuple[int, int]],
    batch_size: int,
    accumulate: torch.dtype,
    source: Source | None,
    is_known: Callable[[str], bool],
    advance: Callable[[int], object],
) -> Iterator[tuple[BlockStep, list["Watcher"]]]:
    """Each layer after all sequences have gone through it, with what was seen of each part of them."""
    linears = [target.name for target in find_targets(model) if target.sort == "linear"]
    attention = [name for name, _ in attention_layers(model)] if _has_sites(model, ids_NT, source) else []
    first_layer = decoder_layers(model)[0][0]
    with attention_sites(model) if attention else nullcontext():
        for step in walk_blocks(model, ids_NT, batch_size=batch_size, source=source):
            if step.name == first_layer:
                _check_finite(step.inputs_NTD, "the output of the embeddings", "activations")
            _check_weights(step)
            watchers = []
            for first, last in parts:
                watcher = None if is_known(step.name) else Watcher(step, linears, attention, accumulate)
                spans = [(first + start, first + stop) for start, stop in batches(last - first, batch_size)]
                _run(step, watcher, spans, advance)
                watchers += [watcher] if watcher else []
            step.outputs_NTD = step.inputs_NTD
            watcher = None
            yield step, watchers
            # Nothing of a layer stays in memory while the next one is summed.
            watchers.clear()


class _Seen:
    """A tensor that was read, told from others by identity: one that is gone or was changed in place is none of them.

    A view of it is another tensor. Tensors of inference mode do not tell when they are changed, so they are never
    taken for one that was seen.
    """

    def __init__(self, x: Tensor) -> None:
        self.tensor = weakref.ref(x)
        self.version = None if x.is_inference() else x._version

    def is_still(self, x: Tensor) -> bool:
        """Whether x is this tensor, with the values that it had."""
        return self.tensor() is x and self.version is not None and self.version == x._version


class Watcher:
    """What is seen of one layer's linears and attention."""

    def __init__(
        self, step: BlockStep, linears: Sequence[str], attention: Sequence[str], accumulate: torch.dtype
    ) -> None:
        inside = f"{step.name}."
        self.layer, self.accumulate = step.layer, accumulate
        self.linears = [name.removeprefix(inside) for name in linears if name.startswith(inside)]
        self.inside = inside
        self._sums: dict[str, InputSums] = {}
        self._latest: dict[InputSums, _Seen] = {}
        self._calls: Counter[str] = Counter()
        self._ranges = {
            f"{name}.{site}".removeprefix(inside): RangeSums(f"{name}.{site}")
            for name in attention
            if name.startswith(inside)
            for site in _SITES
        }

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Take one call of a linear or of a site."""
        if name in self._ranges:
            self._ranges[name].add(args[0])
        else:
            # Statistics are of what meets the weights: a rotated linear rotates its inputs first.
            before = getattr(module, "before", None)
            self._see_linear(name, args[0] if before is None else before(args[0]))

    def _see_linear(self, name: str, x: Tensor) -> None:
        self._calls[name] += 1
        shared = next((sums for sums, seen in self._latest.items() if seen.is_still(x)), None)
        if name not in self._sums:
            self._sums[name] = shared or InputSums(self.inside + name, x.shape[-1], self.accumulate, x.device)
        sums = self._sums[name]
        if sums.name == self.inside + name:
            sums.add(x)
            self._latest[sums] = _Seen(x)
        elif sums is not shared:
            raise self._shared_in_part(name)

    def _shared_in_part(self, name: str) -> CalibrationError:
        """Sums of two linears that turn out to differ cannot be told apart any more."""
        return CalibrationError(
            f"linears that read one tensor must do so in every call, to share its X^T X: {self.inside}{name} and "
            f"{self._sums[name].name} read one in some calls only. This architecture cannot be calibrated."
        )

    def result(self, name: str) -> BlockStats:
        """The layer's statistics; what was summed is used up.

        Raises:
            CalibrationError: X^T X overflows, or linears shared their inputs in some calls only.
        """
        for each, known in self._sums.items():
            if self._calls[each] != self._calls[known.name.removeprefix(self.inside)]:
                raise self._shared_in_part(each)
        results = {sums: sums.result() for sums in self._sums.values()}
        linears = {}
        for each in self.linears:
            sums = self._sums.get(each)
            linears[self.inside + each] = (
                results[sums] if sums else unseen(_inputs(self.layer.get_submodule(each)), self.accumulate)
            )
        # A layer whose attention did not reach its sites is left out.
        attention = {
            self.inside + each: AttentionStats(*(self._ranges[f"{each}.{site}"].result() for site in _SITES))
            for each in dict.fromkeys(place.rpartition(".")[0] for place in self._ranges)
            if all(self._ranges[f"{each}.{site}"].has_seen for site in _SITES)
        }
        return BlockStats(name, linears, attention)

    @property
    def places(self) -> list[str]:
        """Names within the layer of all that is watched."""
        return [*self.linears, *self._ranges]


def _run(
    step: BlockStep,
    watcher: Watcher | None,
    spans: Sequence[tuple[int, int]],
    advance: Callable[[int], object],
) -> None:
    """Send sequences through the layer; their outputs take the place of their inputs."""
    with watch(step.layer, watcher.places, watcher.see) if watcher else nullcontext(), torch.no_grad():
        for start, stop in spans:
            step.inputs_NTD[start:stop] = step.run(start, stop).cpu()
            advance(stop - start)
    _check_finite(step.inputs_NTD[spans[0][0] : spans[-1][1]], f"the output of {step.name}", "activations")


def _check_weights(step: BlockStep) -> None:
    for name, parameter in step.layer.named_parameters():
        _check_finite(parameter, f"{step.name}.{name}", "weights")


def _check_finite(x: Tensor, name: str, what: str) -> None:
    """Refuse NaN and Inf; the extremes carry NaN along, in one pass and without a mask of the tensor's size."""
    if not x.is_floating_point() or not x.numel() or bool(torch.isfinite(torch.stack(x.aminmax())).all()):
        return
    raise CalibrationError(
        f"{what} must be finite to be calibrated: {name} holds {int((~torch.isfinite(x)).sum())} NaN or Inf among "
        f"{x.numel()} values. "
        + ("Get the checkpoint again." if what == "weights" else "Use --dtype float32.")
    )


def _inputs(linear: nn.Module) -> int:
    """in_features of a linear or of GPT-2's Conv1D."""
    return int(getattr(linear, "in_features", None) or linear.nx)  # type: ignore[arg-type]


def _has_sites(model: nn.Module, ids_NT: Tensor, source: Source | None) -> bool:
    """Whether the model's attention reaches its sites, tried on two tokens in the first layer that has attention."""
    reached: list[str] = []
    holders = tuple(name for name, _ in attention_layers(model))
    try:
        with attention_sites(model):
            # Held, since the weights of the step are gone when the walk is.
            steps = walk_blocks(model, ids_NT[:1, :2], source=source)
            step = next(
                (step for step in steps if any(name.startswith(f"{step.name}.") for name in holders)), None
            )
            if step is not None:
                places = [f"*{site}" for site in _SITES]
                with watch(step.layer, places, lambda name, *_: reached.append(name)), torch.no_grad():
                    step.run(0, 1)
            steps.close()
    except ProbeError:
        return False
    return bool(reached)

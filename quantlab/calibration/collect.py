"""One pass over text: for every linear the statistics of its inputs, for every attention layer the ranges of q, k, v.

Of a linear with inputs x (rows of X, one a token):

    gram = X^T X = sum over tokens of x x^T        the Hessian of |W x - W' x|^2 is 2 X^T X
    minimum, maximum, mean of each channel, and the number of tokens

Products are summed in float32 (never TF32 or bfloat16) or in float64, means in float64.

Letters: N sequences, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from probes.attention import attention_sites
from probes.errors import ProbeError
from probes.hooks import watch
from probes.sites import attention_layers, decoder_layers
from quantlab.calibration.statistics import AttentionStats, BlockStats, Calibration, LinearStats
from quantlab.calibration.stream import BlockStep, Source, batches, walk_blocks
from quantlab.calibration.watcher import SITES, Watcher
from quantlab.errors import CalibrationError
from quantlab.layers.targets import find_targets

__all__ = ["calibrate", "check_weights", "collect_blocks", "watched_steps"]


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
) -> Iterator[tuple[BlockStep, list[Watcher]]]:
    """Each layer after all sequences have gone through it, with what was seen of each part of them."""
    linears = [target.name for target in find_targets(model) if target.sort == "linear"]
    attention = [name for name, _ in attention_layers(model)] if _has_sites(model, ids_NT, source) else []
    first_layer = decoder_layers(model)[0][0]
    with attention_sites(model) if attention else nullcontext():
        for step in walk_blocks(model, ids_NT, batch_size=batch_size, source=source):
            if step.name == first_layer:
                _check_finite(step.inputs_NTD, "the output of the embeddings", "activations")
            check_weights(step)
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


def check_weights(step: BlockStep) -> None:
    """Refuse a layer with NaN or Inf among its parameters, the first one named."""
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
                places = [f"*{site}" for site in SITES]
                with watch(step.layer, places, lambda name, *_: reached.append(name)), torch.no_grad():
                    step.run(0, 1)
            steps.close()
    except ProbeError:
        return False
    return bool(reached)

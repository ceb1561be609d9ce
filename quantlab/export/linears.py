"""Which linears of a model get low bits: those of the decoder, without what the user skips."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from probes.sites import decoder_layers
from quantlab.errors import SchemeError

__all__ = ["choose_linears"]


def choose_linears(model: nn.Module, skip: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the decoder's linears: those to quantize, and those that a pattern of `skip` keeps.

    Raises:
        SchemeError: nothing is left to quantize.
    """
    names = [
        f"{layer}.{name}"
        for layer, decoder in decoder_layers(model)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    skipped = [name for name in names if any(fnmatchcase(name, pattern) for pattern in skip)]
    swapped = [name for name in names if name not in set(skipped)]
    if not swapped:
        raise SchemeError(
            f"a scheme must quantize something: skip={list(skip)} keeps all {len(names)} linears."
        )
    return swapped, skipped

"""What a model's weights were before they were loaded, and so what a low-bit copy of it stores.

A bfloat16 checkpoint that is computed in float32 has a copy with bfloat16 scales. Its scores are those of the copy, so
the scales that are scored are rounded as they will be stored, whoever asks: a command, a sweep or a Python program.
"""

import torch
from torch import nn

from quantlab.config import QuantizeConfig
from quantlab.inspection.precision import stored_precision

__all__ = ["note_source_", "scale_dtype_of"]


def note_source_(model: nn.Module, source_precision: str) -> None:
    """Let the model remember how its checkpoint stores weights, as `CheckpointInfo.source_precision` says."""
    model.source_precision = source_precision  # type: ignore[assignment]


def scale_dtype_of(model: nn.Module, config: QuantizeConfig) -> torch.dtype:
    """Dtype that scales of the model's weights are rounded to; without a note its weights are their own source."""
    loaded = next(x.dtype for x in model.parameters() if x.is_floating_point())
    name = str(loaded).removeprefix("torch.")
    if config.scale_dtype != "auto":
        name = config.scale_dtype
    else:
        name = stored_precision(name, getattr(model, "source_precision", name))
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found

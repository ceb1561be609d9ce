"""The architecture that config.json names, and the folder's linears held against it."""

from pathlib import Path

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantlab.errors import CheckpointError, nearest
from quantlab.inspection.checkpoint import CheckpointInfo
from quantlab.layers.linear import weight_of
from quantlab.models.low_bit.carried import Carried
from quantlab.models.stored_names import StoredNames

__all__ = ["check_linears", "config_of", "disagrees", "shape_of", "skeleton_of"]


def config_of(info: CheckpointInfo) -> PreTrainedConfig:
    """config.json without its quantization_config, which transformers would act upon."""
    config = AutoConfig.from_pretrained(info.path, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def skeleton_of(config: PreTrainedConfig, path: Path) -> PreTrainedModel:
    """The architecture without memory for its weights."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise CheckpointError(
            f"low-bit weights must be of a causal language model: {path} is {config.model_type}."
        )
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        skeleton = model_class._from_config(config, dtype=torch.float32)
    assert isinstance(skeleton, PreTrainedModel)
    return skeleton


def check_linears(skeleton: nn.Module, carried: Carried, names: StoredNames) -> None:
    """Every linear that the folder describes is one of the architecture's, of its shape where that is said."""
    known = {
        name: module
        for name, module in skeleton.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | Conv1D)
    }
    path = carried.raw.path
    for stored in carried.linears:
        name = names.loaded(stored)
        if name not in known:
            raise CheckpointError(
                f"low-bit weights must be those of linears that the architecture has: {path} has {name[:100]!r}, "
                f"{type(skeleton).__name__} has not.{nearest(name[:100], known)}"
            )
        entry, shape = carried.entries.get(stored), tuple(weight_of(known[name]).shape)
        transposed = isinstance(known[name], Conv1D)
        if entry and (entry.shape != shape or (entry.body.get("transposed") is True) != transposed):
            raise disagrees(name, entry.shape, shape, path)


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    rows, columns = weight_of(linear).shape
    return rows, columns


def disagrees(name: str, found: tuple[int, ...], expected: tuple[int, ...], path: Path) -> CheckpointError:
    """That a linear's stored shape is not the architecture's."""
    return CheckpointError(
        f"tensors must agree with the config: {path} holds {name!r} of shape {list(found)}, the architecture asks for "
        f"{list(expected)}."
    )

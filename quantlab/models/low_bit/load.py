"""A folder of low-bit weights as a model: the order of its making, and what is told of it."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from quantlab.config import CheckpointConfig
from quantlab.inspection.checkpoint import CheckpointInfo, inspect_checkpoint, inspect_low_bit
from quantlab.inspection.families import family_of
from quantlab.layers.sites import find_outputs, swap_output
from quantlab.models.loading import (
    Checkpoint,
    check_finite,
    load_tokenizer,
    one_sentence,
    quiet,
    resolve_device,
    resolve_dtype,
    with_rows,
)
from quantlab.models.low_bit.architecture import check_linears, config_of, shape_of, skeleton_of
from quantlab.models.low_bit.carried import Carried, read_carried
from quantlab.models.low_bit.floats import with_floats
from quantlab.models.low_bit.linears import put_linear_
from quantlab.models.low_bit.sites import put_sites_
from quantlab.models.stored_names import StoredNames
from quantlab.reading.raw import RawFolder

__all__ = ["load_low_bit"]


def load_low_bit(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    kernel: str = "integer",
    info: CheckpointInfo | None = None,
) -> Checkpoint:
    """The model of a folder of low-bit weights, with the scheme on it; `scheme` of the result says which.

    Args:
        dtype, device: as `CheckpointConfig` has them.
        kernel: a name of `quantlab.kernels.choice.KERNELS`.
        info: what `inspect_checkpoint` said of a folder in quantlab's own format.

    Raises:
        CheckpointError: damaged, not finite, not what its architecture asks for, or in a format that is not read here.
        SchemeError: the kernel cannot take the scheme.
        ConfigError: a device that this machine does not have.
    """
    place = resolve_device(device)
    carried = read_carried(RawFolder(Path(path)))
    with quiet(), one_sentence(Path(path)):
        info = info or _inspect(carried)
        config = config_of(info)
        skeleton = skeleton_of(config, info.path)
        names = carried.names(skeleton)
        check_linears(skeleton, carried, names)
        model = with_floats(config, skeleton, carried, resolve_dtype(dtype, place), names)
        if carried.scheme is not None:
            put_sites_(model, carried, carried.scheme, names)
        rows = [
            put_linear_(model, names.loaded(name), name, carried, place, kernel) for name in carried.linears
        ]
        model.carried = tuple(rows)
        if carried.scheme is not None:
            for name, module, spec in find_outputs(model, carried.scheme):
                swap_output(model, module, name, spec, [])
        tokenizer = load_tokenizer(info, trusted=False)
        model = model.to(place).eval().requires_grad_(False)
        check_finite(model, info.path)
        info = with_rows(_with_linears(info, skeleton, carried, names), model)
    return Checkpoint(model, tokenizer, info, family_of(info.model_type, info.variant), carried.scheme)


def _inspect(carried: Carried) -> CheckpointInfo:
    """What the folder is, once its names, headers and config passed inspection."""
    path = carried.raw.path
    if carried.method == "quantlab":
        return inspect_checkpoint(CheckpointConfig(path=str(path)))
    source = f"{carried.method} {carried.scheme.name if carried.scheme else ''}".strip()
    low = [name for name, owner in carried.linears.items() if owner is not None]
    return inspect_low_bit(path, low, source)


def _with_linears(
    info: CheckpointInfo, skeleton: nn.Module, carried: Carried, names: StoredNames
) -> CheckpointInfo:
    """The same with the shapes of what other formats store packed."""
    if carried.method == "quantlab":
        return info
    found: dict[str, Any] = {}
    linears = {name: shape_of(skeleton.get_submodule(names.loaded(name))) for name in carried.linears}
    for name in carried.linears:
        weight = skeleton.get_parameter(f"{names.loaded(name)}.weight")
        found[f"{name}.weight"] = ("U8", tuple(weight.shape))
    tensors = {**info.tensors, **found}
    return replace(
        info,
        tensors=tensors,
        num_parameters=sum(prod(shape) for _, shape in tensors.values()),
        linears={**info.linears, **linears},
    )

"""Folders of low-bit weights in memory, codes and all: the model that an export is compared with.

`load_low_bit` opens a folder of any safetensors format that `quantlab.reading` decodes. Its architecture comes from
config.json, of which transformers is not shown the quantization_config; what keeps its precision is loaded and checked
as an ordinary checkpoint; every linear in low bits becomes a `QuantLinear` on the codes of the folder; the rest of the
scheme is put on as `quantized` does. So its logits are those of `quantized(model, scheme)` bit for bit.

Schemes that round inside attention need its sites: the model has them for as long as it lives.
"""

import warnings
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from probes.attention import attention_sites
from probes.sites import attention_layers
from quantlab.changes import Change
from quantlab.config import CheckpointConfig
from quantlab.errors import CheckpointError, nearest
from quantlab.inspection.checkpoint import CheckpointInfo, inspect_checkpoint, inspect_low_bit
from quantlab.inspection.families import family_of
from quantlab.kernels.choice import check_integers, check_packed, choose_kernel
from quantlab.layers.linear import QuantLinear, weight_of
from quantlab.layers.rotated import HadamardTransform, HeadHadamard
from quantlab.layers.sites import find_outputs, find_sites, swap_output, swap_site, turn_heads_
from quantlab.methods.solved import Quantized
from quantlab.models.carried import Carried, as_quantized, read_carried
from quantlab.models.loading import (
    Checkpoint,
    attention_of,
    check_complete,
    check_finite,
    load_tokenizer,
    one_sentence,
    quiet,
    resolve_device,
    resolve_dtype,
    with_rows,
)
from quantlab.reading.raw import RawFolder
from quantlab.reading.readers import decoder_of
from quantlab.schemes import Scheme, TensorSpec
from quantlab.transforms.edit import replace_

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
        config = _config_of(info)
        skeleton = _skeleton(config, info.path)
        _check_linears(skeleton, carried)
        model = _loaded(config, skeleton, carried, resolve_dtype(dtype, place))
        if carried.scheme is not None:
            _put_sites_(model, carried, carried.scheme)
        rows = [_put_linear_(model, name, carried, place, kernel) for name in carried.linears]
        model.carried = tuple(rows)
        if carried.scheme is not None:
            for name, module, spec in find_outputs(model, carried.scheme):
                swap_output(model, module, name, spec, [])
        tokenizer = load_tokenizer(info, trusted=False)
        model = model.to(place).eval().requires_grad_(False)
        check_finite(model, info.path)
        info = with_rows(_with_linears(info, skeleton, carried), model)
    return Checkpoint(model, tokenizer, info, family_of(info.model_type, info.variant), carried.scheme)


def _inspect(carried: Carried) -> CheckpointInfo:
    """What the folder is, once its names, headers and config passed inspection."""
    path = carried.raw.path
    if carried.method == "quantlab":
        return inspect_checkpoint(CheckpointConfig(path=str(path)))
    source = f"{carried.method} {carried.scheme.name if carried.scheme else ''}".strip()
    low = [name for name, owner in carried.linears.items() if owner is not None]
    return inspect_low_bit(path, low, source)


def _config_of(info: CheckpointInfo) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(info.path, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _skeleton(config: PreTrainedConfig, path: Path) -> nn.Module:
    """The architecture without memory for its weights."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise CheckpointError(
            f"low-bit weights must be of a causal language model: {path} is {config.model_type}."
        )
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        skeleton = model_class._from_config(config, dtype=torch.float32)
    assert isinstance(skeleton, nn.Module)
    return skeleton


def _check_linears(skeleton: nn.Module, carried: Carried) -> None:
    """Every linear that the folder describes is one of the architecture's, of its shape where that is said."""
    known = {
        name: module
        for name, module in skeleton.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | Conv1D)
    }
    path = carried.raw.path
    for name in carried.linears:
        if name not in known:
            raise CheckpointError(
                f"low-bit weights must be those of linears that the architecture has: {path} has {name[:100]!r}, "
                f"{type(skeleton).__name__} has not.{nearest(name[:100], known)}"
            )
        entry, shape = carried.entries.get(name), tuple(weight_of(known[name]).shape)
        transposed = isinstance(known[name], Conv1D)
        if entry and (entry.shape != shape or (entry.body.get("transposed") is True) != transposed):
            raise _disagrees(name, entry.shape, shape, path)


def _loaded(
    config: PreTrainedConfig, skeleton: nn.Module, carried: Carried, dtype: torch.dtype
) -> PreTrainedModel:
    """The model with all that keeps its precision; its linears in low bits hold zeros that take no memory."""
    raw, model_class = carried.raw, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    own = carried.own
    kept = {name: _tensor(raw, name) for name in raw.tensors if name not in own}
    added = {
        name: kept.pop(f"{name}.bias")
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear)
        and f"{name}.bias" in kept
        and "bias" not in dict(module.named_parameters())
    }
    for name, owner in carried.linears.items():
        if owner is not None:
            kept[f"{name}.weight"] = torch.zeros(1, dtype=dtype).expand(
                skeleton.get_parameter(f"{name}.weight").shape
            )
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=kept,
        dtype=dtype,
        attn_implementation=attention_of(model_class),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    check_complete(report, raw.path)
    for name, bias in added.items():
        # Folding a norm that adds something gives its readers a bias, which the architecture does not have.
        model.get_submodule(name).bias = nn.Parameter(bias.to(dtype))
    file = raw.path / "generation_config.json"
    model.generation_config = (
        GenerationConfig.from_pretrained(raw.path)
        if file.exists()
        else GenerationConfig.from_model_config(config)
    )
    return model


def _tensor(raw: RawFolder, name: str) -> Tensor:
    """A stored tensor in memory of its own."""
    array, dtype = raw.array(name), raw.tensors[name].dtype
    with warnings.catch_warnings():
        values = torch.from_numpy(np.array(array))
    others = {
        "BF16": torch.bfloat16,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
    }
    return values.view(others[dtype]) if dtype in others else values


def _put_sites_(model: PreTrainedModel, carried: Carried, scheme: Scheme) -> None:
    """What rounds inside attention, and the sites that it stands at, for as long as the model lives."""
    if not scheme.sites and not scheme.head_sites:
        return
    stack = ExitStack()
    stack.enter_context(attention_sites(model))
    model.low_bit_sites = stack
    layers = [name for name, _ in attention_layers(model)]
    sites = find_sites(model, scheme, carried.attention(layers))
    width = carried.turned_heads
    if width is not None:
        turn_heads_(sites, [])
        _set_factors_(model, carried.rotation_of(width), width, carried.raw.path)
    for prefix, layer, site, quantizer in sites:
        swap_site(layer, prefix, site, quantizer, [])


def _set_factors_(model: nn.Module, factors: list[Tensor], width: int, path: Path) -> None:
    """Give every rotation of heads the factors that the folder has."""
    for name, module in model.named_modules():
        if not isinstance(module, HeadHadamard):
            continue
        if prod(len(factor) for factor in module.factors) != width:
            raise CheckpointError(
                f"turned_heads must be the channels of a head: {path} has {width}, {name} not."
            )
        for index in range(module.num_factors):
            delattr(module, f"factor_{index}")
        module.num_factors = len(factors)
        for index, factor in enumerate(factors):
            module.register_buffer(f"factor_{index}", factor.clone(), persistent=False)


def _put_linear_(model: nn.Module, name: str, carried: Carried, place: torch.device, kernel: str) -> Change:
    """Put a QuantLinear with the folder's codes in the place of one linear, under every name that it has."""
    linear = model.get_submodule(name)
    if isinstance(linear, QuantLinear):  # a linear that the model holds twice
        return Change(name, "swapped", f"{carried.linears[name]}, held twice", 16, 0, linear.kernel)
    owner, inputs = carried.linears[name], carried.inputs_of(name)
    quantized, bits = None, 16
    if owner is not None:
        decoded = decoder_of(carried.raw).decode(carried.raw, owner)
        if decoded.codes_OI.shape != _shape(linear):
            raise _disagrees(name, decoded.codes_OI.shape, _shape(linear), carried.raw.path)
        quantized, bits = as_quantized(decoded), decoded.bits
    weights = carried.weights_of(name, quantized)
    runs, _ = choose_kernel(weights, inputs, place.type, kernel)
    shapes = {name: _shape(linear)}
    if runs == "int8_mm":
        assert isinstance(weights, TensorSpec) and inputs is not None
        check_integers(weights, inputs, shapes, place)
        if carried.scheme is not None and carried.scheme.method == "hqq":
            runs = "simulated"
    elif runs in ("int4_packed", "int8_packed"):
        assert isinstance(weights, TensorSpec)
        check_packed(runs, weights, shapes)
    if (factors := carried.rotation(name)) is not None:
        linear.before = HadamardTransform(factors)
    swapped = QuantLinear(
        linear,
        cast("Quantized | None", quantized),
        inputs,
        runs,
        name,
        fixed=carried.fixed_inputs(name),
        bias=carried.corrected_bias(name),
    )
    replace_(model, linear, swapped, [])
    num_weights = prod(_shape(linear)) if owner in (None, name) else 0
    why = "as it is" if quantized is None else f"codes of a folder in {carried.method}'s format"
    return Change(name, "swapped", why, bits, num_weights, runs, carried.storage_bits(name))


def _with_linears(info: CheckpointInfo, skeleton: nn.Module, carried: Carried) -> CheckpointInfo:
    """The same with the shapes of what other formats store packed."""
    if carried.method == "quantlab":
        return info
    found: dict[str, Any] = {}
    for name in carried.linears:
        found[f"{name}.weight"] = ("U8", tuple(skeleton.get_parameter(f"{name}.weight").shape))
    linears = {name: _shape(skeleton.get_submodule(name)) for name in carried.linears}
    tensors = {**info.tensors, **found}
    return replace(
        info,
        tensors=tensors,
        num_parameters=sum(prod(shape) for _, shape in tensors.values()),
        linears={**info.linears, **linears},
    )


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    rows, columns = weight_of(linear).shape
    return rows, columns


def _disagrees(name: str, found: tuple[int, ...], expected: tuple[int, ...], path: Path) -> CheckpointError:
    return CheckpointError(
        f"tensors must agree with the config: {path} holds {name!r} of shape {list(found)}, the architecture asks for "
        f"{list(expected)}."
    )

"""Checkpoints that are already quantized: what grid they are on, and their true shapes. No torch.

In compressed-tensors format weights alone are taken: they are dequantized while they load, and the model says so.
Quantized activations would have to be undone to apply another scheme, so such a checkpoint is refused, as are the
formats of other methods. A folder in quantlab's own format is loaded as what it is, scheme and all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import CheckpointError, SchemeError
from quantlab.inspection.safetensors_header import StoredTensor, read_int64s
from quantlab.reading import quantlab_format
from quantlab.schemes import Scheme

_BESIDE = (".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".weight_global_scale")
"""Tensors that describe a quantized weight."""
CACHE_SCALES = (".k_scale", ".v_scale")
"""Tensors that describe a quantized cache."""


def source_of_quantized(quantization: Any, path: Path) -> tuple[str, str | None]:
    """(source_precision, source_scheme) of a config.json's quantization_config.

    Raises:
        CheckpointError: another method's format, or quantized activations.
    """
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == "quantlab":
        carried = carried_scheme(quantization, path).name
        return f"quantlab {carried}", carried
    if method != "compressed-tensors":
        raise CheckpointError(
            f"checkpoint must be in floats or in compressed-tensors: {path} was quantized by {method!r}. Use the "
            f"checkpoint that it was made from."
        )
    try:
        groups = list(quantization["config_groups"].values())
        touched = [group.get(key) for group in groups for key in ("input_activations", "output_activations")]
        if any(touched) or quantization.get("kv_cache_scheme"):
            raise CheckpointError(
                f"a quantized checkpoint must hold weights alone: {path} quantizes activations or the cache too. "
                f"Use the checkpoint that it was made from, with a scheme such as w8a8."
            )
        schemes = {_scheme_of(group["weights"]) for group in groups}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"quantization_config must describe its weights: config.json of {path} does not ({error!r})."
        ) from error
    scheme = schemes.pop() if len(schemes) == 1 else None
    return f"dequantized {scheme or 'compressed-tensors'}", scheme


def carried_scheme(quantization: Mapping[str, Any], path: Path) -> Scheme:
    """The scheme that a folder in quantlab's own format carries.

    Raises:
        CheckpointError: it names none.
    """
    name = quantization.get("scheme")
    try:
        if isinstance(name, str) and len(name) <= 200 and not Scheme.parse(name).is_baseline:
            return Scheme.parse(name)
    except SchemeError:
        pass
    raise CheckpointError(f"quantization_config must name a scheme: that of {path} has {str(name)[:80]!r}.")


def check_scales(quantization: Mapping[str, Any], tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """Every packed weight has its shape and scales of one of the groupings that the config names.

    Raises:
        CheckpointError: scales that are missing, or of another number: a reader would spread them over the rows.
    """
    groupings = [group["weights"] for group in quantization["config_groups"].values()]
    for grouping in groupings:
        size = grouping.get("group_size")
        if grouping["strategy"] == "group" and (type(size) is not int or size < 1):
            raise CheckpointError(f"group_size must be at least 1: config.json of {path} has {size!r}.")
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight_packed")
        if module == name:
            continue
        shape, scale = tensors.get(f"{module}.weight_shape"), tensors.get(f"{module}.weight_scale")
        if shape is None or scale is None:
            raise CheckpointError(
                f"a packed weight must have its shape and scales: {path} lacks those of {module!r}."
            )
        sizes = read_int64s(shape)
        if len(sizes) != 2 or min(sizes) < 1 or tensor.shape[:1] != sizes[:1]:
            raise CheckpointError(
                f"a packed weight must have its own rows: {path} holds {name!r} of shape {list(tensor.shape)} and says "
                f"{list(sizes)}."
            )
        expected = [_scale_shape(grouping, sizes) for grouping in groupings]
        if scale.shape not in expected:
            raise CheckpointError(
                f"scales must be one for each group: {path} holds those of {module!r} as {list(scale.shape)}, its "
                f"config.json asks for {list(expected[0])}."
            )


def _scale_shape(grouping: Mapping[str, Any], sizes: tuple[int, ...]) -> tuple[int, ...]:
    if grouping["strategy"] == "tensor":
        return (1,)
    return (sizes[0], -(-sizes[1] // grouping["group_size"]) if grouping["strategy"] == "group" else 1)


def unpacked(
    tensors: Mapping[str, StoredTensor], quantization: Any = None, path: Path = Path()
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) as the dense model has them: packed weights in their own shape, no scales.

    A dense checkpoint's tensors come back as they are.

    Raises:
        CheckpointError: a quantization_config of quantlab's own that is not one.
    """
    if isinstance(quantization, dict) and quantization.get("quant_method") == "quantlab":
        return _of_quantlab(tensors, quantization, path)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight_packed")
        if module != name and f"{module}.weight_shape" in tensors:
            shapes[f"{module}.weight"] = (tensor.dtype, read_int64s(tensors[f"{module}.weight_shape"]))
        elif not name.endswith(_BESIDE):
            shapes[name] = (tensor.dtype, tensor.shape)
    return shapes


def _of_quantlab(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any], path: Path
) -> dict[str, tuple[str, tuple[int, ...]]]:
    linears = quantlab_format.shapes(quantization, str(path))
    own = {f"{name}.{leaf}" for name in linears for leaf in quantlab_format.LEAVES}
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items() if name not in own}
    return shapes | {f"{name}.weight": ("U8", shape) for name, shape in linears.items()}


def _scheme_of(weights: Mapping[str, Any]) -> str | None:
    """`w4g32z` for the weights of a config group; None for a grid that is not uniform."""
    if weights.get("type", "int") != "int":
        return None
    granularities = {"channel": "", "tensor": "t", "group": f"g{weights.get('group_size')}"}
    if weights["strategy"] not in granularities:
        return None
    return f"w{weights['num_bits']}{granularities[weights['strategy']]}{'' if weights['symmetric'] else 'z'}"

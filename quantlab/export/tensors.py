"""Every tensor of a quantized checkpoint: under which name, in which dtype, and which are not written at all."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from quantlab.errors import CheckpointError
from quantlab.export.shards import Layout, Part, TensorType
from quantlab.inspection.precision import stored_precision

__all__ = ["dtype_name", "exactly", "holds", "model_parts", "stored_dtype", "tied_names"]


def stored_dtype(model: PreTrainedModel, source_precision: str) -> torch.dtype:
    """Dtype of scales and kept tensors: the source's own where it holds every value of the model, else the model's.

    A bfloat16 checkpoint that was loaded in float32 is written in bfloat16, losslessly; a dequantized GGUF is
    written in the dtype that it was loaded in.
    """
    loaded: torch.dtype = next(
        parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()
    )
    source: torch.dtype = getattr(torch, stored_precision(dtype_name(loaded), source_precision))
    if source == loaded:
        return loaded
    tensors = (tensor for tensor in model.state_dict().values() if tensor.is_floating_point())
    return source if all(holds(source, tensor) for tensor in tensors) else loaded


def model_parts(model: PreTrainedModel, layout: Layout, dtype: torch.dtype) -> Iterator[Part]:
    """Every tensor of the model in its order, under the name that it has in a checkpoint."""
    state = model.state_dict()
    tied = tied_names(model)
    names = _checkpoint_names(model, [name for name in state if name not in tied])
    for name, stored in names.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in layout.linears:
            yield _renamed(layout.linears[owner], stored.removesuffix("weight"))
        else:
            yield _kept(stored, state[name], dtype)


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names that a reader ties to another tensor by itself: output heads that share the embedding's memory."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    state = model.state_dict()
    return {name for name, of in tied.items() if name in state and _same_memory(state[name], state[of])}


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, as config.json writes it."""
    return str(dtype).removeprefix("torch.")


def holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether the dtype has every value of the tensor."""
    return tensor.dtype == dtype or torch.equal(tensor, tensor.to(dtype).to(tensor.dtype))


def exactly(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers on the CPU, contiguous, in a dtype that must hold them."""
    stored = values.detach().to("cpu", dtype).contiguous()
    assert torch.equal(stored.float(), values.detach().float().cpu()), (
        f"{dtype} must hold the numbers exactly"
    )
    return stored


def _renamed(part: Part, prefix: str) -> Part:
    tensors = {prefix + name: tensor for name, tensor in part.tensors.items()}
    return Part(tensors, lambda: {prefix + name: t for name, t in part.build().items()}, part.num_linears)


def _kept(name: str, tensor: Tensor, dtype: torch.dtype) -> Part:
    """A tensor that keeps its values: in the stored dtype where that holds them all, else in its own."""
    stored = dtype if tensor.is_floating_point() and holds(dtype, tensor) else tensor.dtype
    # A copy, since tensors of a shard may not share memory.
    return Part(
        {name: TensorType(stored, tuple(tensor.shape))},
        lambda: {name: tensor.detach().to("cpu", stored, copy=True).contiguous()},
    )


def _same_memory(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape


def _checkpoint_names(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """Name in the model -> name in its checkpoints, for architectures that transformers renames while loading."""
    conversions = getattr(model, "_weight_conversions", None) or ()
    if any(_changes_tensors(conversion) for conversion in conversions):
        raise CheckpointError(
            f"export needs an architecture whose tensors are stored as the model holds them: "
            f"{type(model).__name__} merges or splits them while loading. Evaluate it instead."
        )
    markers = {name: torch.tensor(position) for position, name in enumerate(names)}
    stored = {int(marker): name for name, marker in revert_weight_conversion(model, markers).items()}
    return {name: stored[position] for position, name in enumerate(names)}


def _changes_tensors(conversion: object) -> bool:
    """Whether a conversion that transformers made while loading has to be undone on values, and not on names only."""
    operations = conversion.operations if isinstance(conversion, WeightConverter) else ()
    # Dequantizing has no way back but to leave the floats as they are, which is what is wanted here.
    return any(type(operation.reverse_op).__name__ != "_IdentityOp" for operation in operations)

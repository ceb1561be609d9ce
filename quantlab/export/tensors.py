"""Every tensor of a quantized checkpoint: under which name, in which dtype, and which are not written at all."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantlab.export.shards import Layout, Part, TensorType
from quantlab.inspection.precision import stored_precision
from quantlab.models.stored_names import StoredNames

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


def model_parts(
    model: PreTrainedModel, layout: Layout, dtype: torch.dtype, names: StoredNames
) -> Iterator[Part]:
    """Every tensor of the model in its order, under the name that it has in a checkpoint."""
    state = model.state_dict()
    tied = tied_names(model)
    for name, stored in names.tensors.items():
        if name in tied:
            continue
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

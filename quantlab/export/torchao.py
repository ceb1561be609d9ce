"""The torchao format: weights of 2 to 8 bits in tensor subclasses, as transformers' TorchAoConfig saves and loads them.

Letters: O output features, I input features, G scales in a row (1 per channel, I / group_size per group), b bits. A
linear keeps its bias; its `weight` is replaced as follows, named from the linear. All numbers are little-endian.

    _weight_qdata       int8 [O, I]: codes c - 2^(b-1), where c counts from 0. One byte a code, whatever b: torchao 0.18
                        packs nothing that a CPU reads, so 4 bits take the room of 8.
    _weight_scale       [O, G]: float32 with 8 bits symmetric (Int8Tensor), else in the stored dtype.
    _weight_zero_point  int8 [O, G]: z - 2^(b-1); 0 on a symmetric grid.

A weight is (qdata - zero_point) * scale. Symmetric 8 bits are torchao's Int8Tensor, all others its
IntxUnpackedToInt8Tensor.

The header of every weight file holds what rebuilds the subclasses, as torchao's `flatten_tensor_state_dict` writes it:

    tensor_names        JSON list of the names of all parameters and buffers of the model.
    NAME                of each of them, JSON: {"_type": "Tensor"}, or the subclass's `_type`, its attributes (`_data`:
                        block_size [1, I / G], dtype, target_dtype "int<b>", ...) and its `_tensor_data_names`.

config.json gets the `quantization_config` of TorchAoConfig: Int8WeightOnlyConfig or IntxWeightOnlyConfig under
`quant_type.default`, and in `modules_to_not_convert` the name of every linear that is stored as it was. Tested with
transformers 5.23 and torchao 0.18.0.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.export.job import ExportJob
from quantlab.export.linears import kept_linears, separate_linears
from quantlab.export.shards import Layout, Part, TensorType
from quantlab.export.tensors import dtype_name, exactly
from quantlab.methods.solved import Quantized
from quantlab.numerics.affine import QuantizedTensor
from quantlab.schemes import TensorSpec

__all__ = ["layout"]


def layout(job: ExportJob) -> Layout:
    """How the linears of the job are stored; its scheme and linears are such as the format's checks accept."""
    spec = job.scheme.weights
    assert isinstance(spec, TensorSpec), "the format's check lets no other weights through"
    linears = separate_linears(job)
    return Layout(
        linears={name: _part(job, name, linear, spec) for name, linear in linears.items()},
        quantization_config=_quantization_config(job, spec),
        name="Int8Tensor" if _is_int8(spec) else "IntxUnpackedToInt8Tensor",
        num_codes=sum(linear.weight.numel() for linear in linears.values()),
        metadata=_metadata(job, linears, spec),
    )


def _is_int8(spec: TensorSpec) -> bool:
    return spec.bits == 8 and spec.symmetric


def _part(job: ExportJob, name: str, linear: nn.Linear, spec: TensorSpec) -> Part:
    """The tensors that stand for a linear's weight; they are computed when the part is built."""
    rows, width = linear.weight.shape
    groups = width // (spec.group_size or width)
    dtype = torch.float32 if _is_int8(spec) else job.dtype
    tensors = {
        "_weight_qdata": TensorType(torch.int8, (rows, width)),
        "_weight_scale": TensorType(dtype, (rows, groups)),
        "_weight_zero_point": TensorType(torch.int8, (rows, groups)),
    }
    return Part(tensors, lambda: _tensors(job.codes(name), dtype), num_linears=1)


def _tensors(quantized: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    assert isinstance(quantized, QuantizedTensor), "the format's check lets no other codes through"
    codes, zero, half = quantized.codes.cpu(), quantized.zero_point, 2 ** (quantized.qtype.bits - 1)
    scale = exactly(quantized.scale, dtype)
    if zero is None:
        zeros = torch.zeros(scale.shape, dtype=torch.int8)
    else:
        codes = (codes.to(torch.int16) - half).to(torch.int8)
        zeros = (zero.cpu() - half).to(torch.int8)
    return {
        "_weight_qdata": codes.contiguous(),
        "_weight_scale": scale,
        "_weight_zero_point": zeros.contiguous(),
    }


def _metadata(job: ExportJob, linears: dict[str, nn.Linear], spec: TensorSpec) -> dict[str, str]:
    """What rebuilds the tensor subclasses, for the header."""
    names = [job.names.tensors[name] for name in job.model.state_dict()]
    weights = {f"{job.names.module(name)}.weight": linear.in_features for name, linear in linears.items()}
    described = {
        name: _subclass(job, spec, weights[name]) if name in weights else {"_type": "Tensor"}
        for name in names
    }
    texts = {name: json.dumps(body) for name, body in described.items()}
    return texts | {"tensor_names": json.dumps(names)}


def _subclass(job: ExportJob, spec: TensorSpec, width: int) -> dict[str, Any]:
    """One weight as torchao's encoder describes it."""
    block, dtype = [1, spec.group_size or width], _torch_dtype(dtype_name(job.dtype))
    if _is_int8(spec):
        return {
            "_type": "Int8Tensor",
            "_data": {"act_quant_kwargs": None, "reduce_range": False, "block_size": block, "dtype": dtype},
            "_tensor_data_names": ["zero_point", "qdata", "scale"],
        }
    return {
        "_type": "IntxUnpackedToInt8Tensor",
        "_data": {
            "target_dtype": _torch_dtype(f"int{spec.bits}"),
            "block_size": block,
            "dtype": dtype,
            "activation_quantization": None,
        },
        "_tensor_data_names": ["qdata", "scale", "zero_point"],
    }


def _torch_dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _quantization_config(job: ExportJob, spec: TensorSpec) -> dict[str, Any]:
    name = "Int8WeightOnlyConfig" if _is_int8(spec) else "IntxWeightOnlyConfig"
    data = _int8_data(spec) if _is_int8(spec) else _intx_data(spec)
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": name, "_version": 2, "_data": data}},
        "modules_to_not_convert": kept_linears(job),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def _int8_data(spec: TensorSpec) -> dict[str, Any]:
    return {
        "group_size": None,
        "granularity": _per_group(spec) or {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
        "set_inductor_config": True,
    }


def _intx_data(spec: TensorSpec) -> dict[str, Any]:
    mapping = "SYMMETRIC" if spec.symmetric else "ASYMMETRIC"
    return {
        "weight_dtype": _torch_dtype(f"int{spec.bits}"),
        "granularity": _per_group(spec) or {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}},
        "mapping_type": {"_type": "MappingType", "_data": mapping},
        "scale_dtype": None,
        "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
    }


def _per_group(spec: TensorSpec) -> dict[str, Any] | None:
    if spec.group_size is None:
        return None
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": spec.group_size}}

"""How a job's linears are stored: the tensors of each, its entry, and what stands beside them all."""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantlab.errors import SchemeError
from quantlab.export.job import ExportJob
from quantlab.export.quantlab_format.affine import affine_plan
from quantlab.export.quantlab_format.beside import beside
from quantlab.export.quantlab_format.block import block_plan
from quantlab.export.quantlab_format.plan import Plan
from quantlab.export.quantlab_format.table import TABLES, table_plan
from quantlab.export.shards import Layout, Part, TensorType
from quantlab.export.tensors import exactly, holds
from quantlab.layers.linear import weight_of
from quantlab.layers.rotated import RotatedLinear
from quantlab.methods.solved import Solved
from quantlab.numerics.block import BLOCK_TYPES
from quantlab.numerics.static import static_range
from quantlab.schemes import Scheme, TensorSpec, WeightFormat

__all__ = ["VERSION", "layout"]

VERSION = 1
"""Of the format."""


def layout(job: ExportJob) -> Layout:
    """How the linears of the job are stored."""
    parts: dict[str, Part] = {}
    entries: dict[str, dict[str, Any]] = {}
    owners: dict[int, str] = {}
    for name in job.linears:
        owner = owners.setdefault(id(job.model.get_submodule(name).weight), name)
        parts[name], entries[name] = _linear(job, name, owner)
    for name, module in job.model.named_modules():
        if isinstance(module, RotatedLinear) and name not in entries:
            entries[name] = {"kind": "float", "skipped": True, "rotated": True} | _shape(module)
    config = {
        "quant_method": "quantlab",
        "version": VERSION,
        "scheme": job.scheme.name,
        "linears": _stored(job, entries),
    }
    return Layout(
        linears=parts,
        quantization_config=config | beside(job, entries),
        name=f"quantlab-{VERSION}",
        num_codes=sum(weight_of(job.model.get_submodule(name)).numel() for name in owners.values()),
    )


def _stored(job: ExportJob, entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries under the names that the linears have in the files."""
    return {
        job.names.module(name): entry | ({"as": job.names.module(entry["as"])} if "as" in entry else {})
        for name, entry in entries.items()
    }


def _linear(job: ExportJob, name: str, owner: str) -> tuple[Part, dict[str, Any]]:
    """One linear's tensors, made when the part is built, and its entry.

    Args:
        owner: the first linear that has the same matrix.
    """
    linear, weights = job.model.get_submodule(name), job.ready.weights_of(name)
    plan = _plan(job, linear, weights) if owner == name else Plan({"kind": "same", "as": owner}, {})
    fixed = _fixed_inputs(job, name)
    corrects = weights is not None and "bias" in job.scheme.transforms
    entry = plan.entry | _shape(linear)
    tensors = plan.tensors | {leaf: TensorType(each.dtype, tuple(each.shape)) for leaf, each in fixed.items()}
    if fixed:
        entry["inputs"] = "static"
    if isinstance(linear, RotatedLinear):
        entry["rotated"] = True
    if corrects:
        _check_own(name, owner)
        entry["corrected_bias"] = True
        tensors["corrected_bias"] = TensorType(weight_of(linear).dtype, (weight_of(linear).shape[0],))

    def build() -> dict[str, Tensor]:
        if owner != name:
            return dict(fixed)
        if weights is None:
            return fixed | _kept(linear, plan)
        quantized = job.codes(name)
        made = fixed | {leaf: tensor.cpu() for leaf, tensor in plan.build(quantized).items()}
        if corrects:
            bias = job.ready.bias(name, Solved(quantized))
            assert bias is not None
            made["corrected_bias"] = bias.cpu()
        return made

    return Part(tensors, build, num_linears=1), entry


def _plan(job: ExportJob, linear: nn.Module, weights: TensorSpec | WeightFormat | None) -> Plan:
    """How a matrix under this spec is stored."""
    if weights is None:
        kept = linear.weight
        assert isinstance(kept, Tensor)
        dtype = job.dtype if holds(job.dtype, kept) else kept.dtype
        return Plan({"kind": "float"}, {"weight": TensorType(dtype, tuple(kept.shape))})
    shape = tuple(weight_of(linear).shape)
    if isinstance(weights, TensorSpec):
        plan = affine_plan(shape, weights, job.dtype, real=job.scheme.method == "hqq")
    elif weights.name in TABLES:
        plan = table_plan(shape, weights, job.dtype)
    elif weights.name.upper() in BLOCK_TYPES:
        plan = block_plan(shape, weights)
    else:
        raise SchemeError(
            f"format quantlab has no layout for weights in {weights.name}. Use another scheme of weights."
        )
    return plan._replace(entry=plan.entry | {"weights": Scheme(weights).name})


def _shape(linear: nn.Module) -> dict[str, Any]:
    """What every entry holds."""
    shape = {"shape": list(weight_of(linear).shape)}
    return shape | ({"transposed": True} if isinstance(linear, Conv1D) else {})


def _fixed_inputs(job: ExportJob, name: str) -> dict[str, Tensor]:
    """The range of a linear's inputs under a static spec."""
    spec = job.scheme.activations
    if spec is None or not spec.static:
        return {}
    stats = job.ready.stats[name]
    low, high = static_range(spec, stats.minimum_I, stats.maximum_I)
    return {"input_low": low.cpu().contiguous(), "input_high": high.cpu().contiguous()}


def _check_own(name: str, owner: str) -> None:
    if owner != name:
        raise SchemeError(
            f"a corrected bias goes with a matrix of its own: {name} shares that of {owner}. Leave bias out."
        )


def _kept(linear: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The floats of a matrix that keeps them."""
    kept = linear.weight
    assert isinstance(kept, Tensor)
    return {leaf: exactly(kept, each.dtype) for leaf, each in plan.tensors.items()}

"""What stands beside the linears in config.json: tables, rotations, and the fixed ranges of attention."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from probes.sites import attention_layers
from quantlab.export.job import ExportJob
from quantlab.export.quantlab_format.table import TABLES
from quantlab.layers.rotated import HadamardTransform
from quantlab.numerics.static import static_range
from quantlab.transforms.hadamard import factors_of

__all__ = ["beside"]


def beside(job: ExportJob, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """These entries of quantization_config, each where something needs it.

    Args:
        entries: the linears, as config.json describes them.
    """
    found: dict[str, Any] = {}
    if tables := sorted({entry["table"] for entry in entries.values() if "table" in entry}):
        found["tables"] = {name: _array(TABLES[name]) for name in tables}
    rotations = _of_inputs(job, entries)
    if width := _turned_heads(job):
        rotations.setdefault(str(width), factors_of(width))
        found["turned_heads"] = width
    if rotations:
        found["rotations"] = {size: [_array(each) for each in factors] for size, factors in rotations.items()}
    if any(spec.static for spec in job.scheme.head_sites.values()):
        found["attention"] = {
            job.names.module(layer): _ranges(job, layer) for layer, _ in attention_layers(job.model)
        }
    return found


def _array(values: Tensor) -> dict[str, Any]:
    """Numbers as config.json holds them: float32, bit for bit."""
    exact = values.detach().float().cpu().contiguous()
    return {"shape": list(exact.shape), "float32": exact.numpy().astype("<f4").tobytes().hex()}


def _of_inputs(job: ExportJob, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Sequence[Tensor]]:
    """Size -> factors of the rotation of inputs of linears."""
    rotations: dict[str, Sequence[Tensor]] = {}
    for name, entry in entries.items():
        if entry.get("rotated"):
            before = job.model.get_submodule(name).before
            assert isinstance(before, HadamardTransform)
            rotations[str(entry["shape"][1])] = before.factors
    return rotations


def _turned_heads(job: ExportJob) -> int | None:
    """Channels of the heads whose queries and keys are rotated, as `layers.sites.turn_heads_` does it."""
    read = {"attn_query", "attn_key", "kv_cache"} & set(job.scheme.head_sites)
    if not read or not {"rotate", "spin"} & set(job.scheme.transforms):
        return None
    layer = attention_layers(job.model)[0][1]
    width = getattr(layer, "head_dim", None) or getattr(layer, "head_size", None)
    assert isinstance(width, int), f"{type(layer).__name__} says how wide its heads are"
    return width


def _ranges(job: ExportJob, layer: str) -> dict[str, list[dict[str, Any]]]:
    """The fixed ranges of one attention layer."""
    found = {}
    for site, spec in job.scheme.head_sites.items():
        names = ("attn_key", "attn_value") if site == "kv_cache" else (site,)
        for name in names if spec.static else ():
            seen = getattr(job.ready.attention[layer], name.removeprefix("attn_"))
            low, high = static_range(spec, seen.minimum_HC, seen.maximum_HC)
            found[name] = [_array(low.squeeze(-2)), _array(high.squeeze(-2))]
    return found

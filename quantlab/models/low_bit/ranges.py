"""Fixed ranges that a folder carries, as calibration gave them: of inputs of linears, and inside attention."""

from typing import Any

import torch

from quantlab.calibration.statistics import AttentionStats, Ranges
from quantlab.errors import CheckpointError
from quantlab.models.low_bit.carried import Carried
from quantlab.models.low_bit.codes import as_tensor
from quantlab.models.stored_names import StoredNames
from quantlab.numerics.static import Fixed
from quantlab.reading import quantlab_format
from quantlab.reading.raw import RawFolder

__all__ = ["attention_ranges", "fixed_inputs"]


def fixed_inputs(carried: Carried, name: str) -> Fixed | None:
    """The range of a linear's inputs under a static spec.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    inputs = carried.inputs_of(name)
    if inputs is None or not inputs.static:
        return None
    width = carried.entries[name].shape[1] if name in carried.entries else 1
    places = 1 if inputs.granularity == "tensor" else width
    low, high = (carried.raw.floats(f"{name}.input_{end}", (1, places)) for end in ("low", "high"))
    return _range(low, high, f"inputs of {name}", carried.raw)


def attention_ranges(carried: Carried, layers: list[str], names: StoredNames) -> dict[str, AttentionStats]:
    """The fixed ranges of each layer's queries, keys and values."""
    assert carried.scheme is not None
    sites = {name for site, spec in carried.scheme.head_sites.items() if spec.static for name in _sites(site)}
    if not sites:
        return {}
    if carried.method == "compressed-tensors":
        return {layer: _of_cache(carried.raw, names.module(layer)) for layer in layers}
    return {layer: _of_layer(carried.raw, names.module(layer), sites) for layer in layers}


def _of_layer(raw: RawFolder, layer: str, sites: set[str]) -> AttentionStats:
    nothing = Ranges(torch.zeros(1, 1), torch.zeros(1, 1))
    found = {"attn_query": nothing, "attn_key": nothing, "attn_value": nothing}
    for site in sites:
        found[site] = _of_site(raw, layer, site)
    return AttentionStats(found["attn_query"], found["attn_key"], found["attn_value"])


def _of_site(raw: RawFolder, layer: str, site: str) -> Ranges:
    """What config.json has of one site."""
    known: Any = raw.quantization.get("attention")
    for key in (layer, site):
        known = known.get(key) if isinstance(known, dict) else None
    if not isinstance(known, list) or len(known) != 2:
        raise CheckpointError(
            f"static ranges must be stored: config.json of {raw.path} has none of {site} of {layer}."
        )
    low, high = (quantlab_format.array(each, f"attention of {layer}", str(raw.path)) for each in known)
    if low.ndim != 2 or low.shape != high.shape:
        raise CheckpointError(
            f"static ranges must be of heads and channels: {site} of {layer} in {raw.path} is not."
        )
    return Ranges(*_range(low, high, f"{site} of {layer}", raw))


def _of_cache(raw: RawFolder, layer: str) -> AttentionStats:
    """A layer's ranges from the scales of its cache: what 127 steps span."""
    found = {}
    for kind in ("k", "v"):
        end = 127 * raw.floats(f"{layer}.{kind}_scale", (1,)).reshape(1, 1)
        found[kind] = Ranges(*_range(-end, end, f"{kind}_scale of {layer}", raw))
    return AttentionStats(found["k"], found["k"], found["v"])


def _sites(site: str) -> tuple[str, ...]:
    return ("attn_key", "attn_value") if site == "kv_cache" else (site,)


def _range(low: Any, high: Any, what: str, raw: RawFolder) -> Fixed:
    ends = as_tensor(low), as_tensor(high)
    if not bool((ends[0].isfinite() & ends[1].isfinite() & (ends[0] <= ends[1])).all()):
        raise CheckpointError(
            f"a static range must be finite and in order: that of {what} in {raw.path} is not."
        )
    return ends

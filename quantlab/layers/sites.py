"""Sites: which places of a model hold what a scheme rounds beside weights and their inputs, and how they are swapped.

    attn_logits, attn_probs, attn_effective   l p e    FakeQuant of all heads, or of those of one map
    attn_query, attn_key, attn_value          q k v    FakeQuant
    attn_key and attn_value                   kv       CachedHeads
    lambda_, decoder layers                   d x      QuantOutput around them

Everything is found, checked and made before anything is swapped.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from probes.sites import attention_layers, decoder_layers, map_of_head
from quantlab.calibration.statistics import AttentionStats
from quantlab.changes import Change
from quantlab.errors import CalibrationError, SchemeError, nearest
from quantlab.layers.fake_quant import FakeQuant, QuantOutput
from quantlab.layers.kv_cache import CachedHeads
from quantlab.layers.rotated import HeadHadamard
from quantlab.layers.targets import parents_of
from quantlab.numerics.granularity import Kind
from quantlab.numerics.static import Fixed, static_range
from quantlab.schemes import Scheme, TensorSpec
from quantlab.schemes.places import CACHE_GROUP
from quantlab.transforms.edit import Undo, replace_

__all__ = [
    "FoundSite",
    "find_outputs",
    "find_sites",
    "swap_output",
    "swap_site",
    "turn_heads_",
]

_ALONE: dict[str, Callable[[TensorSpec], Scheme]] = {
    "attn_query": lambda spec: Scheme(query=spec),
    "attn_key": lambda spec: Scheme(key=spec),
    "attn_value": lambda spec: Scheme(value=spec),
    "kv_cache": lambda spec: Scheme(cache=spec),
    "attn_logits": lambda spec: Scheme(logits=spec),
    "attn_probs": lambda spec: Scheme(probs=spec),
    "attn_effective": lambda spec: Scheme(effective=spec),
}
"""Site -> the scheme that quantizes it alone."""

FoundSite = tuple[str, nn.Module, str, FakeQuant | CachedHeads]
"""(layer's dotted name, layer, site, what will stand there)."""


def find_sites(
    model: nn.Module, scheme: Scheme, attention: Mapping[str, AttentionStats] | None = None
) -> list[FoundSite]:
    """Every attention site that the scheme quantizes, in the model's order, with what will stand there.

    Args:
        attention: calibration's ranges by the layer's dotted name, for static queries, keys, values and caches.

    Raises:
        SchemeError: the model is outside `attention_sites`, or its attention has no such site, map or group size.
        CalibrationError: a static range that calibration did not give.
    """
    if not scheme.sites and not scheme.head_sites:
        return []
    layers = attention_layers(model)
    if not all(hasattr(layer, "attn_logits") for _, layer in layers):
        raise SchemeError(
            f"{scheme.name} quantizes attention sites, which live inside attention_sites(model): enter it around "
            "quantize_, or use quantized(model, scheme)."
        )
    found: list[FoundSite] = []
    for name, layer in layers:
        for site, spec in scheme.head_sites.items():
            _check_head_site(scheme, name, layer, site, spec)
            found += _at_heads(name, layer, site, spec, attention)
        for site, spec in scheme.sites.items():
            found.append((name, layer, site, _at_map(scheme, name, layer, site, spec)))
    return found


def _at_map(scheme: Scheme, name: str, layer: nn.Module, site: str, spec: TensorSpec) -> FakeQuant:
    """What rounds both maps, each by itself, or one of them."""
    if not hasattr(layer, site):
        raise SchemeError(
            f"{scheme.name} quantizes effective maps, which exist where attention joins its maps before the values: "
            f"{name} ({type(layer).__name__}) joins none. Leave the part 'e' out."
        )
    kind: Kind = "probs" if site == "attn_probs" else "map"
    maps = map_of_head(layer)
    if spec.granularity == "map":
        return FakeQuant(spec, kind, map_of_head=maps)
    if spec.map is None:
        return FakeQuant(spec, kind)
    heads = [head for head, which in enumerate(maps) if which == spec.map - 1]
    if 1 not in maps:
        raise SchemeError(
            f"{scheme.name} quantizes one of the two maps of differential attention: {name} "
            f"({type(layer).__name__}) subtracts none. Leave m{spec.map} out."
        )
    return FakeQuant(spec, kind, heads=heads)


def _check_head_site(scheme: Scheme, name: str, layer: nn.Module, site: str, spec: TensorSpec) -> None:
    """Refuse what a layer's heads cannot have."""
    if site != "attn_value" and getattr(layer, "is_local", False):
        raise SchemeError(
            f"{scheme.name} quantizes queries or keys, which meet in a product: {name} ({type(layer).__name__}, "
            "potential=local) makes one number of each token instead. Quantize its logits (l) or values (v)."
        )
    width = _head_width(layer)
    if site == "attn_value" or (site == "kv_cache" and spec.granularity == "channel"):
        # Values may be wider than queries and keys, as a pair's are.
        width = getattr(getattr(layer, "heads", None), "value_dim", width)
    size, instead = spec.group_size, f"leave g{spec.group_size} out"
    if site == "kv_cache" and spec.granularity == "channel" and not spec.static:
        size, instead = CACHE_GROUP, f"kv{spec.bits}{spec.modifiers}"
    if width is not None and size is not None and width % size:
        raise SchemeError(
            f"group_size must divide the channels of a head: {name} has {width}, {scheme.name} asks for {size}. "
            f"Use one scale per token ({instead})."
        )


def _at_heads(
    name: str,
    layer: nn.Module,
    site: str,
    spec: TensorSpec,
    attention: Mapping[str, AttentionStats] | None,
) -> list[FoundSite]:
    """What rounds queries, keys or values; a cache's keys and values both."""
    if site != "kv_cache":
        return [(name, layer, site, FakeQuant(spec, "heads", fixed=_fixed(name, site, spec, attention)))]
    keys = CachedHeads(spec, "keys", fixed=_fixed(name, "attn_key", spec, attention))
    values = CachedHeads(spec, "values", fixed=_fixed(name, "attn_value", spec, attention))
    return [(name, layer, "attn_key", keys), (name, layer, "attn_value", values)]


def _fixed(
    name: str, site: str, spec: TensorSpec, attention: Mapping[str, AttentionStats] | None
) -> Fixed | None:
    """The range of a static spec, from calibration."""
    if not spec.static:
        return None
    if attention is None or name not in attention:
        which = "none was given" if attention is None else f"{name} is not in it"
        raise CalibrationError(
            f"static scales come from a calibration of this model's attention: {which}. Calibrate first, or leave the "
            f"'s' out.{nearest(name, attention or ())}"
        )
    ranges = getattr(attention[name], site.removeprefix("attn_"))
    return static_range(spec, ranges.minimum_HC, ranges.maximum_HC)


def find_outputs(model: nn.Module, scheme: Scheme) -> list[tuple[str, nn.Module, TensorSpec]]:
    """(name, module, spec) of every lambda and decoder layer whose output the scheme quantizes."""
    found: list[tuple[str, nn.Module, TensorSpec]] = []
    if scheme.lambdas is not None:
        layers = [item for item in attention_layers(model) if getattr(item[1], "lambda_of_tokens", False)]
        if not layers:
            raise SchemeError(
                f"{scheme.name} quantizes lambda of each token, which {type(model).__name__} has not: its attention "
                "has no lambda, or one a layer, which lies on its own grid. Leave the part 'd' out."
            )
        found += [
            (f"{prefix}.lambda_", layer.get_submodule("lambda_"), scheme.lambdas) for prefix, layer in layers
        ]
    if scheme.hidden is not None:
        layers = decoder_layers(model)
        if not all(type(parent) is nn.ModuleList for parent, _ in parents_of(model, layers[0][1])):
            raise SchemeError(
                f"{scheme.name} quantizes outputs of decoder layers, which run one after the other: those of "
                f"{type(model).__name__} are integrated over depth. Leave the part 'x' out."
            )
        found += [(name, layer, scheme.hidden) for name, layer in layers]
    return found


def swap_site(
    layer: nn.Module, prefix: str, site: str, quantizer: FakeQuant | CachedHeads, undo: Undo
) -> Change:
    """Put what `find_sites` made in its place."""
    standing = layer.get_submodule(site)
    holder, place = (standing, "then") if isinstance(standing, HeadHadamard) else (layer, site)
    undo.append((holder, place, getattr(holder, place)))
    setattr(holder, place, quantizer.train(layer.training).to(next(layer.parameters()).device))
    alone = "kv_cache" if isinstance(quantizer, CachedHeads) else site
    what = _ALONE[alone](quantizer.spec).name
    return Change(f"{prefix}.{site}", "swapped", what, quantizer.spec.bits, 0, "simulated")


def turn_heads_(found: Sequence[FoundSite], undo: Undo) -> list[str]:
    """Rotate queries and keys by one Hadamard matrix, ahead of what rounds either of them, in every layer found.

    Their products stay what they were. Returns what a record says of it.
    """
    layers = {layer: None for _, layer, site, _ in found if site in ("attn_query", "attn_key")}
    for layer in layers:
        width = _head_width(layer)
        assert width is not None, f"{type(layer).__name__} says how wide its heads are"
        for site in ("attn_query", "attn_key"):
            undo.append((layer, site, layer.get_submodule(site)))
            setattr(layer, site, HeadHadamard(width).to(next(layer.parameters()).device))
    return [f"queries and keys of {len(layers)} layers are turned as they arrive"] if layers else []


def _head_width(layer: nn.Module) -> int | None:
    """Channels of a query or key head, whatever the layer calls them."""
    width = getattr(layer, "head_dim", None) or getattr(layer, "head_size", None)
    return width if isinstance(width, int) else None


def swap_output(model: nn.Module, module: nn.Module, name: str, spec: TensorSpec, undo: Undo) -> Change:
    """Put a QuantOutput around one module."""
    is_lambda = name.endswith(".lambda_")
    parts = Scheme(lambdas=spec) if is_lambda else Scheme(hidden=spec)
    kind: Kind = "lambdas" if is_lambda else "inputs"
    replace_(model, module, QuantOutput(module, spec, kind).train(module.training), undo)
    return Change(name, "swapped", parts.name, spec.bits, 0, "simulated")

"""Sites: which places of a model hold what a scheme rounds beside weights and their inputs, and how they are swapped.

The sites of attention logits, probabilities and joined maps become `FakeQuant`; lambdas and decoder layers are wrapped
in a `QuantOutput`. Everything is found before anything is swapped.
"""

from collections.abc import Callable

from torch import nn

from probes.sites import attention_layers, decoder_layers
from quantlab.changes import Change
from quantlab.errors import SchemeError
from quantlab.layers.fake_quant import FakeQuant, QuantOutput
from quantlab.layers.targets import parents_of
from quantlab.schemes import Scheme, TensorSpec

__all__ = ["Undo", "find_outputs", "find_sites", "replace_module", "swap_output", "swap_site"]

_ALONE: dict[str, Callable[[TensorSpec], Scheme]] = {
    "attn_logits": lambda spec: Scheme(logits=spec),
    "attn_probs": lambda spec: Scheme(probs=spec),
    "attn_effective": lambda spec: Scheme(effective=spec),
}
"""Site -> the scheme that quantizes it alone."""
Undo = list[tuple[nn.Module, str, nn.Module]]
"""(parent, attribute, module that was there) of every swap, in order."""


def find_sites(model: nn.Module, scheme: Scheme) -> list[tuple[str, nn.Module, str, TensorSpec]]:
    """(layer's name, layer, site, spec) of every attention site that the scheme quantizes."""
    if not scheme.sites:
        return []
    layers = attention_layers(model)
    if not all(hasattr(layer, "attn_logits") for _, layer in layers):
        raise SchemeError(
            f"{scheme.name} quantizes attention sites, which live inside attention_sites(model): enter it around "
            "quantize_, or use quantized(model, scheme)."
        )
    lacking = [prefix for prefix, layer in layers if not all(hasattr(layer, name) for name in scheme.sites)]
    if lacking:
        raise SchemeError(
            f"{scheme.name} quantizes effective maps, which exist where attention joins its maps before the values: "
            f"{lacking[0]} ({type(model.get_submodule(lacking[0])).__name__}) joins none. Leave the part 'e' out."
        )
    return [(prefix, layer, name, spec) for prefix, layer in layers for name, spec in scheme.sites.items()]


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


def swap_site(layer: nn.Module, prefix: str, name: str, spec: TensorSpec, undo: Undo | None) -> Change:
    """Put a FakeQuant in the place of one attention site."""
    if undo is not None:
        undo.append((layer, name, layer.get_submodule(name)))
    setattr(layer, name, FakeQuant(spec, "map"))
    what = _ALONE[name](spec).name
    return Change(f"{prefix}.{name}", "swapped", what, spec.bits, 0, "simulated")


def swap_output(
    model: nn.Module, module: nn.Module, name: str, spec: TensorSpec, undo: Undo | None
) -> Change:
    """Put a QuantOutput around one module."""
    parts = Scheme(lambdas=spec) if name.endswith(".lambda_") else Scheme(hidden=spec)
    replace_module(model, module, QuantOutput(module, spec).train(module.training), undo)
    return Change(name, "swapped", parts.name, spec.bits, 0, "simulated")


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module, undo: Undo | None) -> None:
    """Put a module in the place of another, wherever the model holds it; noted in `undo`, where there is one."""
    for parent, name in list(parents_of(model, old)):
        setattr(parent, name, new)
        if undo is not None:
            undo.append((parent, name, old))

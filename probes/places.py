"""Where the parts of a decoder layer are, in the architectures that transformers has: names as data.

A part is found by the last component of its dotted name, inside the attention module or outside it. An architecture
that calls a part otherwise has no such part here, and the measures that need it say so. A part that several layers
share is found in the first of them, and shows every call.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from probes.sites import attention_layers, decoder_layers, decoder_stack

ATTENTION_INPUTS = ("q_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv")
"""The linear that takes what attention reads; where q, k and v are three, q's."""
ATTENTION_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
"""The linear that gives what attention adds to the residual stream."""
FFN_INPUTS = ("gate_proj", "gate_up_proj", "up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h")
"""The linear that expands; where there are two, the first of this list."""
FFN_OUTPUTS = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h")
"""The linear that contracts."""


def parts(model: nn.Module, names: tuple[str, ...], *, attention: bool) -> dict[str, int]:
    """The part of each decoder layer by one of the names, inside attention or outside: dotted name -> layer."""
    inside = {name for name, _ in attention_layers(model)}
    named = {name for name, _ in model.named_modules()}  # a shared module under its first name only
    found: dict[str, int] = {}
    for index, (prefix, layer) in enumerate(decoder_layers(model)):
        here: dict[str, str] = {}
        for name, _ in layer.named_modules(prefix=prefix):
            of_attention = any(name.startswith(f"{outer}.") for outer in inside)
            if of_attention == attention and name in named:
                here.setdefault(name.rpartition(".")[2], name)
        for name in names:
            if name in here:
                found[here[name]] = index
                break
    return found


def norms(model: nn.Module) -> dict[str, int]:
    """The norms that stand directly in each decoder layer: dotted name -> layer."""
    named = {name for name, _ in model.named_modules()}
    return {
        f"{prefix}.{name}": index
        for index, (prefix, layer) in enumerate(decoder_layers(model))
        for name, child in layer.named_children()
        if "Norm" in type(child).__name__ and f"{prefix}.{name}" in named
    }


def final_norm(model: nn.Module) -> str | None:
    """The norm after the last decoder layer, if the stack has one."""
    prefix, stack = decoder_stack(model)
    names = [name for name, child in stack.named_children() if "Norm" in type(child).__name__]
    return f"{prefix}.{names[-1]}".lstrip(".") if names else None


def layer_of_attention(model: nn.Module) -> dict[str, int]:
    """Attention module -> index of the decoder layer that it is in."""
    layers = [f"{name}." for name, _ in decoder_layers(model)]
    return {
        name: index
        for name, _ in attention_layers(model)
        for index, prefix in enumerate(layers)
        if name.startswith(prefix)
    }


def decoder_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The matrices of the decoder layers: every two-dimensional `weight`, with the name of its module.

    Also of modules that hold codes and give the real matrix when it is asked for.
    """
    named = {name for name, _ in model.named_modules()}
    for prefix, layer in decoder_layers(model):
        for name, module in layer.named_modules(prefix=prefix):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and name in named:
                yield name, weight

"""What a scheme rounds inside attention. The sites that it stands at stay for as long as the model lives."""

from contextlib import ExitStack
from math import prod
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.attention import attention_sites
from probes.sites import attention_layers
from quantlab.errors import CheckpointError
from quantlab.layers.rotated import HeadHadamard
from quantlab.layers.sites import find_sites, swap_site, turn_heads_
from quantlab.models.low_bit.carried import Carried
from quantlab.models.low_bit.ranges import attention_ranges
from quantlab.models.stored_names import StoredNames
from quantlab.schemes import Scheme

__all__ = ["put_sites_"]


def put_sites_(model: PreTrainedModel, carried: Carried, scheme: Scheme, names: StoredNames) -> None:
    """Put what rounds inside attention on the model, with the ranges and rotations of the folder."""
    if not scheme.sites and not scheme.head_sites:
        return
    stack = ExitStack()
    stack.enter_context(attention_sites(model))
    model.low_bit_sites = stack
    layers = [name for name, _ in attention_layers(model)]
    sites = find_sites(model, scheme, attention_ranges(carried, layers, names))
    width = carried.turned_heads
    if width is not None:
        turn_heads_(sites, [])
        _set_factors_(model, carried.rotation_of(width), width, carried.raw.path)
    for prefix, layer, site, quantizer in sites:
        swap_site(layer, prefix, site, quantizer, [])


def _set_factors_(model: nn.Module, factors: list[Tensor], width: int, path: Path) -> None:
    """Give every rotation of heads the factors that the folder has."""
    for name, module in model.named_modules():
        if not isinstance(module, HeadHadamard):
            continue
        if prod(len(factor) for factor in module.factors) != width:
            raise CheckpointError(
                f"turned_heads must be the channels of a head: {path} has {width}, {name} not."
            )
        for index in range(module.num_factors):
            delattr(module, f"factor_{index}")
        module.num_factors = len(factors)
        for index, factor in enumerate(factors):
            module.register_buffer(f"factor_{index}", factor.clone(), persistent=False)

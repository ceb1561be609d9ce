"""How many decoder layers a config means: those that tensors are stored of, and those that the model has. No torch.

They differ where one block serves every layer (`models/continuous.py`): it is stored once, as layer 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlab.inspection.architectures import OURS

__all__ = ["ADAPTIVE", "Layers", "layers_of"]

ONE_BLOCK = ("continuous_depth",)
"""Variants of quantlab's own models that store one block."""
ADAPTIVE = ("dopri5",)
"""Their solvers that choose their steps: the block is one layer of the model, otherwise every evaluation is one."""


@dataclass(frozen=True)
class Layers:
    """Numbers of decoder layers; None where the config does not tell."""

    num_stored: int | None
    """Those of which a checkpoint holds tensors."""
    num_in_model: int | None
    """Those of the model, which has linears in each."""

    @property
    def share_a_block(self) -> bool:
        """Whether layer 0 is stored for all of them."""
        return self.num_stored != self.num_in_model

    def of_stored(self, layer: int) -> range:
        """The layers of the model that a stored one serves; none where the model leaves it out."""
        if self.share_a_block and layer == 0:
            return range(self.num_in_model or 0)
        is_left_out = self.num_stored is not None and layer >= self.num_stored
        return range(layer, layer if is_left_out else layer + 1)


def layers_of(config: Mapping[str, Any], sizes: Mapping[str, int]) -> Layers:
    """What a config.json and its sizes say of them."""
    count = sizes.get("num_hidden_layers")
    if config.get("model_type") != OURS or config.get("variant") not in ONE_BLOCK or count is None:
        return Layers(count, count)
    options = config.get("variant_options")
    solver = options.get("solver") if isinstance(options, Mapping) else None
    return Layers(1, 1 if solver in ADAPTIVE else count)

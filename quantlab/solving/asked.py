"""What is asked of a model's linears: the scheme, its settings, and the dtype that scales are stored in."""

from dataclasses import dataclass

import torch

from quantlab.config import QuantizeConfig
from quantlab.schemes import Scheme, TensorSpec, WeightFormat, weights_of

__all__ = ["Asked"]


@dataclass(frozen=True)
class Asked:
    """What is asked of a model's linears."""

    scheme: Scheme
    config: QuantizeConfig
    scale_dtype: torch.dtype

    def weights_of(self, name: str) -> TensorSpec | WeightFormat | None:
        """The grid of one linear; None where it stays at 16 bits."""
        return weights_of(name, self.scheme, self.config.widths)

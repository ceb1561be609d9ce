"""Text for toy models, and their calibrations on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlab.calibration.cache import calibrated
from quantlab.calibration.statistics import Calibration
from tests import toys


def ids(num_sequences: int = 4, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Seeded tokens, [N, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, toys.NUM_TOKENS, (num_sequences, length), generator=generator)


def store(folder: Path, model: nn.Module | None = None, **changes: Any) -> Calibration:
    """A toy model's calibration, from the folder where it is there."""
    return calibrated(model or toys.toy_model(), ids(), **{"folder": folder, "checkpoint": "abc"} | changes)

"""Folders of low-bit weights, and the simulated model that each is compared with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.calibration.calibrator import Calibrator
from quantlab.config import CheckpointConfig, QuantizeConfig
from quantlab.export.folder import ExportSummary, export_checkpoint
from quantlab.models.loading import Checkpoint, load_checkpoint
from quantlab.quantize import quantized
from quantlab.schemes import Scheme
from tests.toys import NUM_TOKENS


def ids(seed: int) -> Tensor:
    return torch.randint(0, NUM_TOKENS, (2, 16), generator=torch.Generator().manual_seed(seed))


def loaded(folder: Path, **options: Any) -> Checkpoint:
    return load_checkpoint(CheckpointConfig(path=str(folder), device="cpu", **options))


def export(
    checkpoint: Checkpoint, scheme: str, out: Path, form: str = "quantlab", **options: Any
) -> ExportSummary:
    parsed = Scheme.parse(scheme)
    calibrator = Calibrator(ids(0), batch_size=2) if parsed.needs else None
    config = QuantizeConfig(**options)
    return export_checkpoint(checkpoint, parsed, form, out, config=config, calibrator=calibrator)


def logits(checkpoint: Checkpoint) -> Tensor:
    with torch.no_grad():
        found: Tensor = checkpoint.model(ids(1)).logits
    return found


def simulated(checkpoint: Checkpoint, scheme: str, scale_dtype: torch.dtype, **options: Any) -> Tensor:
    parsed = Scheme.parse(scheme)
    calibrator = Calibrator(ids(0), batch_size=2) if parsed.needs else None
    config = QuantizeConfig(**options)
    with quantized(checkpoint.model, parsed, config, scale_dtype=scale_dtype, calibrator=calibrator):
        return logits(checkpoint)

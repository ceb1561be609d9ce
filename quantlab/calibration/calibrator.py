"""Calibrator: the text of a calibration, and what a model's linears and attention see of it, when somebody asks.

Statistics belong to a model as it is: transforms change what linears see, so each state of the model is calibrated once
and kept under the transforms that made it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantlab.calibration.cache import FOLDER, calibrated
from quantlab.calibration.collect import calibrate
from quantlab.calibration.statistics import AttentionStats, Calibration, LinearStats
from quantlab.config import CalibrationConfig

if TYPE_CHECKING:
    from quantlab.models.loading import Checkpoint

__all__ = ["Calibrator", "calibrator_of"]

Advance = Callable[[int], object]


@dataclass
class Calibrator:
    """Text and statistics of one model."""

    ids_NT: Tensor
    """Token ids, [N, T] int64."""
    batch_size: int = 8
    accumulate: torch.dtype = torch.float32
    folder: Path | None = None
    """Where statistics are kept on disk; None keeps them in memory."""
    checkpoint: str = ""
    """Hash of the checkpoint's content, where statistics go to disk."""
    source: str = ""
    """Name of the text."""
    advance: Advance = lambda count: None
    """Told how many sequences have gone through a layer."""
    _known: dict[str, Calibration] = field(default_factory=dict, repr=False)

    def linears(self, model: nn.Module, made_by: str = "") -> Mapping[str, LinearStats]:
        """Statistics of the inputs of every linear of the model as it is.

        Args:
            made_by: what was done to the model since it was loaded, empty for nothing.

        Raises:
            CalibrationError: the text or the model cannot be calibrated.
        """
        return self._of(model, made_by).linears

    def attention(self, model: nn.Module, made_by: str = "") -> Mapping[str, AttentionStats]:
        """Ranges of queries, keys and values of every attention layer that has sites; else as `linears`."""
        return self._of(model, made_by).attention

    def summary(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"source": self.source, "num_tokens": self.ids_NT.numel(), "sequences": len(self.ids_NT)}

    def _of(self, model: nn.Module, made_by: str) -> Calibration:
        if made_by not in self._known:
            how: dict[str, Any] = {
                "batch_size": self.batch_size,
                "accumulate": self.accumulate,
                "advance": self.advance,
            }
            # Statistics of another state of the model are not needed again in this process.
            self._known.clear()
            self._known[made_by] = (
                calibrate(model, self.ids_NT, **how)
                if self.folder is None
                else calibrated(
                    model,
                    self.ids_NT,
                    folder=self.folder,
                    checkpoint=self.checkpoint,
                    transforms=made_by,
                    **how,
                )
            )
        return self._known[made_by]


def calibrator_of(
    checkpoint: "Checkpoint", config: CalibrationConfig, advance: Advance = lambda count: None
) -> Calibrator:
    """The calibrator of a loaded checkpoint, its statistics on disk.

    Raises:
        DataError: an unusable text.
    """
    from quantlab.data.text import text_blocks

    rows = checkpoint.model.get_input_embeddings().weight.shape[0]
    blocks = text_blocks(config.text, checkpoint.tokenizer, num_embeddings=rows)
    return Calibrator(
        torch.from_numpy(blocks.ids_NT),
        batch_size=config.batch_size,
        accumulate=getattr(torch, config.accumulate),
        folder=config.cache or FOLDER,
        checkpoint=checkpoint.content_hash(),
        source=blocks.source,
        advance=advance,
    )

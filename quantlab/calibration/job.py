"""The job of `quantlab calibrate`: a checkpoint and a text in, a stored calibration or a verdict on the text out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantlab.calibration.cache import FOLDER, calibrated
from quantlab.calibration.check import check_text_of
from quantlab.calibration.source import FolderSource, must_stream, open_lent
from quantlab.calibration.statistics import Calibration
from quantlab.calibration.stored import linear_facts
from quantlab.config import RunConfig
from quantlab.data.text import TextBlocks, text_blocks
from quantlab.inspection.checkpoint import contents_of, inspect_checkpoint
from quantlab.inspection.contents import Contents
from quantlab.models.loading import load_checkpoint

__all__ = ["calibrate_checkpoint", "check_checkpoint"]


@dataclass(frozen=True)
class _Opened:
    """A checkpoint ready to be walked, and the text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: FolderSource | None
    blocks: TextBlocks
    contents: Contents

    @property
    def ids_NT(self) -> Tensor:
        return torch.from_numpy(self.blocks.ids_NT)

    def about(self) -> dict[str, Any]:
        """The text, as results name it."""
        N, T = self.blocks.ids_NT.shape
        return {
            **self.blocks.facts(),
            "num_sequences": N,
            "sequence_length": T,
        }


def calibrate_checkpoint(config: RunConfig, advance: Callable[[int], object]) -> dict[str, Any]:
    """Calibrate the run's first checkpoint, unless that is stored already; what was found, and where it is.

    Raises:
        UserError: a fault of checkpoint, text or place, or activations that cannot be summed.
    """
    opened = _open(config)
    folder = config.calibration.cache or FOLDER
    found = calibrated(
        opened.model,
        opened.ids_NT,
        folder=folder,
        checkpoint=opened.contents.sha256,
        batch_size=config.calibration.batch_size,
        accumulate=getattr(torch, config.calibration.accumulate),
        source=opened.source,
        advance=advance,
        check=opened.contents.check,
    )
    return _summary(found, folder / found.key) | {
        "text": opened.about(),
        "streamed": opened.source is not None,
    }


def check_checkpoint(config: RunConfig, advance: Callable[[int], object]) -> dict[str, Any]:
    """Whether the configured text is enough to calibrate the run's first checkpoint.

    Raises:
        UserError: as `calibrate_checkpoint`.
    """
    opened = _open(config)
    found = check_text_of(
        opened.model,
        opened.ids_NT,
        opened.tokenizer,
        batch_size=config.calibration.batch_size,
        accumulate=getattr(torch, config.calibration.accumulate),
        source=opened.source,
        advance=advance,
    )
    return found.summary() | {"text": opened.about()}


def _open(config: RunConfig) -> _Opened:
    own, info = config.checkpoints[0], inspect_checkpoint(config.checkpoints[0])
    contents = contents_of(info)
    model: PreTrainedModel
    if must_stream(own, info, config.calibration.stream):
        lent = open_lent(own, info)
        model, tokenizer, source = lent.model, lent.tokenizer, lent.source
    else:
        checkpoint = load_checkpoint(own, info)
        model, tokenizer, source = checkpoint.model, checkpoint.tokenizer, None
    rows = model.get_input_embeddings().weight.shape[0]
    blocks = text_blocks(config.calibration.text, tokenizer, num_embeddings=rows)
    return _Opened(model, tokenizer, source, blocks, contents)


def _summary(found: Calibration, path: Path) -> dict[str, Any]:
    """What a calibration holds, with what a method may stumble over."""
    linears = linear_facts(path)
    notes = []
    if short := [name for name, facts in linears.items() if facts["num_tokens"] < facts["in_features"]]:
        facts = linears[short[0]]
        notes.append(
            f"{len(short)} linears saw fewer tokens than they have inputs, so their X^T X has no full rank: {short[0]} "
            f"has {facts['in_features']} inputs and saw {facts['num_tokens']} tokens."
        )
    for what, name in (("zero on every token", "num_dead"), ("constant", "num_constant")):
        if count := sum(facts[name] for facts in linears.values()):
            notes.append(f"{count} input channels are {what}.")
    if not found.attention:
        notes.append("Attention has no sites in this architecture: no ranges of queries, keys and values.")
    size = sum(file.stat().st_size for file in path.iterdir())
    return {
        "calibration": str(path),
        "num_tokens": int(found.ids_NT.numel()),
        "linears": len(found.linears),
        "attention_layers": len(found.attention),
        "bytes": size,
        "notes": notes,
    }

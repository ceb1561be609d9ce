"""What a writer is given: a model as it is to be written, and the codes of its linears when it asks for them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantlab.export.codes import Codes
from quantlab.inspection.checkpoint import CheckpointInfo
from quantlab.models.stored_names import StoredNames
from quantlab.quantize import Prepared
from quantlab.schemes import Scheme

__all__ = ["ExportJob"]


@dataclass(frozen=True)
class ExportJob:
    """One export."""

    model: PreTrainedModel
    """Transforms are done; the linears in low bits still hold real weights."""
    tokenizer: PreTrainedTokenizerBase
    info: CheckpointInfo
    """The checkpoint that the model comes from."""
    scheme: Scheme
    linears: tuple[str, ...]
    """Names of the linears in low bits, in the model's order."""
    dtype: torch.dtype
    """Of everything that keeps its precision, and of scales where the format fixes no other (`Format.scale_dtype`)."""
    codes: Codes
    max_shard_size: int
    """Bytes of a weight file at most."""
    advance: Callable[[int], object]
    """Told how many linears were written since the last call."""
    ready: Prepared
    """Everything else that the scheme made of the model: corrected biases, statistics, notes."""

    @cached_property
    def names(self) -> StoredNames:
        """Under which names its tensors are written."""
        return StoredNames.of_model(self.model)

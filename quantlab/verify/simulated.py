"""Our simulated model of a folder: the decoded weights in a model of transformers, in several arithmetics.

    float64                       the reference: as the next line, in float64
    float32, bfloat16, float16    parameters in that dtype, and what transformers computes with them; what the scheme
                                  rounds besides weights is rounded
    q8                            float32, inputs of linears rounded as llama.cpp does it: in blocks of 32, of 256
                                  beside K types, scale = absmax / 127
    inputs                        float32: of engines that round inputs of linears as the scheme says
    unrounded                     float64 without that rounding: what `inputs` is measured against

Every tensor of the folder has its place in the model and the other way round. T tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantlab.config import CheckpointConfig
from quantlab.layers.linear import QuantLinear, weight_of
from quantlab.models.loading import Checkpoint, load_checkpoint
from quantlab.models.low_bit import load_low_bit
from quantlab.verify.sources import GGUF, Source

__all__ = ["ARITHMETICS", "Forward", "forward_of", "load_simulated", "reference_of"]

Forward = Callable[[list[int]], tuple[NDArray[np.float32], list[NDArray[np.float32]] | None]]

ARITHMETICS = ("float32", "bfloat16", "float16", "q8", "inputs")
"""What an engine may compute in."""
_DTYPES = ("float64", "float32", "bfloat16", "float16")


def load_simulated(folder: Path, source: Source, arithmetic: str = "float32") -> Checkpoint:
    """The model of a folder, computing in an arithmetic of those above, on the CPU.

    Raises:
        CheckpointError: a tensor too many, one too few, one of another shape, or not finite.
        SchemeError: the scheme cannot be put on this model.
    """
    dtype = arithmetic if arithmetic in _DTYPES else "float64" if arithmetic == "unrounded" else "float32"
    if (folder / GGUF).exists():
        config = CheckpointConfig(path=str(folder / GGUF), device="cpu", dtype="float32")
        checkpoint = load_checkpoint(config)
        _decode_(checkpoint.model, source)
        # Buffers stay as they are, as in a model that is loaded in the dtype: frequencies need float32.
        for parameter in checkpoint.model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    else:
        checkpoint = load_low_bit(folder, dtype=dtype, device="cpu", kernel="simulated")
    if arithmetic == "q8":
        _round_inputs_(checkpoint.model, source.rounded_inputs())
    if arithmetic == "unrounded":
        _leave_inputs_(checkpoint.model)
    return checkpoint


def _decode_(model: nn.Module, source: Source) -> None:
    """Give linears in low bits the weights that our decoder finds: gguf-py, which read them, is an engine's too."""
    for name in source.linears():
        weight = weight_of(model.get_submodule(name))
        with torch.no_grad():
            weight.copy_(torch.from_numpy(source.decode(name).real()))


def reference_of(arithmetic: str) -> str:
    """What answers in an arithmetic are measured against."""
    return "unrounded" if arithmetic == "inputs" else "float64"


def forward_of(model: PreTrainedModel) -> Forward:
    """Logits [T, V] and hidden states (the embedding's, then each layer's) of one row of tokens."""

    @torch.no_grad()
    def forward(ids: list[int]) -> tuple[NDArray[np.float32], list[NDArray[np.float32]] | None]:
        output = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        hidden = [states[0].float().numpy() for states in output.hidden_states]
        return output.logits[0].float().numpy(), hidden

    return forward


class _Rounded(nn.Module):
    """A linear whose inputs are rounded to 8 bits, `block_size` of them to a scale."""

    def __init__(self, linear: nn.Linear | Conv1D, block_size: int) -> None:
        super().__init__()
        self.linear, self.block_size = linear, block_size

    @property
    def weight(self) -> Tensor:
        """The linear's own, which some models look at."""
        weight: Tensor = self.linear.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, self.block_size))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        rounded = (blocks / scale.clamp_min(torch.finfo(x.dtype).tiny)).round() * scale
        output: Tensor = self.linear(rounded.flatten(-2))
        return output


def _round_inputs_(model: nn.Module, sizes: dict[str, int]) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and name in sizes:
            assert weight_of(module).shape[1] % sizes[name] == 0, "blocks of a type fill its rows"
            model.set_submodule(name, _Rounded(module, sizes[name]))


def _leave_inputs_(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.real_weight, module.codes = module.weight, None
            module.inputs = None

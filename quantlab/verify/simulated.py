"""Our simulated model of a folder: a dense transformers model that holds the decoded weights, in several arithmetics.

Weights are what the independent decoder finds, in float32; the rest is what the folder keeps. Every tensor of the
folder must have its place in the model and the other way round.

    float64                       the reference
    float32, bfloat16, float16    parameters in that dtype, and what transformers computes with them
    q8                            float32, inputs of linears rounded as llama.cpp does it: blocks of 32, or of 256
                                  beside K types, scale = absmax / 127
    a8                            float32, inputs of linears rounded per token, scale = absmax / 127

T tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quantlab.config import CheckpointConfig
from quantlab.errors import CheckpointError
from quantlab.models.loading import load_checkpoint
from quantlab.verify.sources import GGUF, RawSource, Source

__all__ = ["ARITHMETICS", "Forward", "forward_of", "load_simulated"]

Forward = Callable[[list[int]], tuple[NDArray[np.float32], list[NDArray[np.float32]] | None]]

ARITHMETICS = ("float32", "bfloat16", "float16", "q8", "a8")
"""What a reader may compute in."""


def load_simulated(
    folder: Path, source: Source, arithmetic: str = "float32", block_size: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense model of a folder, computing in an arithmetic, and its tokenizer.

    Args:
        arithmetic: `float64` or one of `ARITHMETICS`.
        block_size: inputs that share a scale where inputs are rounded, if it divides their number, else 32; none means
            all of a token.

    Raises:
        CheckpointError: a tensor too many, one too few, or one of another shape.
    """
    if (folder / GGUF).exists():
        checkpoint = load_checkpoint(CheckpointConfig(path=str(folder / GGUF), device="cpu", dtype="float32"))
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
    else:
        assert isinstance(source, RawSource)
        model = _dense_model(folder, source)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    _compute_in_(model, arithmetic, block_size)
    return model, tokenizer


def forward_of(model: PreTrainedModel) -> Forward:
    """Logits [T, V] and hidden states (the embedding's, then each layer's) of one row of tokens."""

    @torch.no_grad()
    def forward(ids: list[int]) -> tuple[NDArray[np.float32], list[NDArray[np.float32]] | None]:
        output = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        hidden = [states[0].float().numpy() for states in output.hidden_states]
        return output.logits[0].float().numpy(), hidden

    return forward


def _dense_model(folder: Path, source: RawSource) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    del config.quantization_config
    model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=_dense(source),
        dtype=torch.float32,
        attn_implementation="eager",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _check_places(report, folder)
    dense: PreTrainedModel = model.eval().requires_grad_(False)
    return dense


def _compute_in_(model: PreTrainedModel, arithmetic: str, block_size: int | None) -> None:
    if arithmetic in ("q8", "a8"):
        for place, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                model.set_submodule(place, _Rounded(module, block_size))
        return
    # Buffers stay as they are, as in a model that is loaded in the dtype: frequencies of positions need float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, arithmetic))


class _Rounded(nn.Module):
    """A linear whose inputs are rounded to 8 bits."""

    def __init__(self, linear: nn.Linear, block_size: int | None) -> None:
        super().__init__()
        self.linear = linear
        size = linear.in_features
        self.block_size = size if block_size is None else block_size if size % block_size == 0 else 32

    @property
    def weight(self) -> Tensor:
        """The linear's own, which some models look at."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, self.block_size))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        rounded = (blocks / scale.clamp_min(torch.finfo(x.dtype).tiny)).round() * scale
        output: Tensor = self.linear(rounded.flatten(-2))
        return output


def _dense(source: RawSource) -> dict[str, Tensor]:
    """Every tensor of a plain checkpoint: decoded weights, and what the folder keeps."""
    state = {f"{name}.weight": torch.from_numpy(source.decode(name).real()) for name in source.linears()}
    for name in sorted(source.raw.tensors.keys() - source.coded()):
        stored = source.raw.tensors[name]
        if stored.dtype in ("F64", "F32", "F16", "BF16"):
            state[name] = torch.from_numpy(source.raw.floats(name))
        else:
            state[name] = torch.from_numpy(np.array(source.raw.array(name)))
    return state


def _check_places(report: Mapping[str, Any], folder: Path) -> None:
    faults = {
        "lacks weights of its model": report["missing_keys"],
        "holds tensors that its model has no place for": report["unexpected_keys"],
        "holds tensors of another shape than its model": [key[0] for key in report["mismatched_keys"]],
    }
    for fault, names in faults.items():
        if names:
            raise CheckpointError(
                f"folder must hold exactly its model: {folder} {fault}: {min(names)!r}. Export again."
            )

"""llama.cpp in this process: tests that need it are skipped where it is not installed (`make readers`)."""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """A `llama_cpp.Llama` of a file, one thread, keys and values in float32, logits of every token."""
    llama_cpp = pytest.importorskip("llama_cpp")
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_extra_buffers() -> Any:
        params = defaults()
        # Its AMX kernels crash where the machine has the instructions and the system does not allow them.
        params.use_extra_bufts = False
        return params

    for name in ("outnull_file", "errnull_file"):  # which it opens as a module and leaves open
        atexit.register(getattr(llama_cpp._utils, name).close)
    settings = {"n_ctx": 256, "logits_all": True, "type_k": 0, "type_v": 0} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without_extra_buffers)
        llama = llama_cpp.Llama(str(path), n_threads=1, n_threads_batch=1, verbose=False, **settings)
    try:
        yield llama
    finally:
        llama.close()


def logits_of(path: Path, ids: list[int]) -> np.ndarray:
    """Logits [T, V] of token ids."""
    with opened(path) as llama:
        llama.eval(ids)
        return np.array(llama.scores[: len(ids)])


def rounded_inputs(model: PreTrainedModel, scheme: str, *, head: bool = False) -> PreTrainedModel:
    """The model with inputs of its decoder's linears at 8 bits, as llama.cpp has them: a scale per 256 or 32.

    Args:
        head: also of the one that makes the logits, which it rounds where its matrix is in low bits.
    """

    def round_input(module: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        group_size = 256 if scheme.endswith("_k") and args[0].shape[-1] % 256 == 0 else 32
        groups = args[0].unflatten(-1, (-1, group_size))
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return ((groups / scale).round() * scale).flatten(-2)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and (head or name != "lm_head"):
            module.register_forward_pre_hook(cast(Any, round_input))
    return model

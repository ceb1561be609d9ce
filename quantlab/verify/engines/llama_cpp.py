"""llama.cpp through llama-cpp-python: folders of gguf on a CPU. Stand-alone: no quantlab.

It rounds inputs of linears to 8 bits in blocks, as fits the type of the weights (`q8`). Its cache is kept in float32
here and flash attention is off, so that nothing else is rounded. It tells no hidden states.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ARITHMETIC", "VERSIONS", "load"]

Forward = Callable[[list[int]], tuple[np.ndarray, list[np.ndarray] | None]]

ARITHMETIC = "q8"
_NUM_TOKENS = 2048
"""Tokens of a row at most."""
_FLOAT32 = 0
"""ggml's number of that type."""


def VERSIONS() -> dict[str, str]:
    """Of what computes."""
    return {"llama_cpp_python": version("llama_cpp_python")}


def load(folder: str) -> Forward:
    """The only .gguf file of a folder: token ids -> logits [T, V], float32."""
    import llama_cpp

    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_extra_buffers() -> Any:
        params = defaults()
        # Its AMX kernels crash where the machine has the instructions and the system does not allow them.
        params.use_extra_bufts = False
        return params

    # Llama takes no such option; this process runs nothing else.
    llama_cpp.llama_cpp.llama_model_default_params = without_extra_buffers
    (file,) = sorted(Path(folder).glob("*.gguf"))
    model: Any = llama_cpp.Llama(
        str(file),
        n_ctx=_NUM_TOKENS,
        n_batch=_NUM_TOKENS,
        n_ubatch=_NUM_TOKENS,
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=0,
        logits_all=True,
        flash_attn=False,
        type_k=_FLOAT32,
        type_v=_FLOAT32,
        verbose=False,
    )

    def forward(ids: list[int]) -> tuple[np.ndarray, list[np.ndarray] | None]:
        model.reset()
        model.eval(ids)
        return np.array(model.scores[: len(ids)], dtype=np.float32), None

    return forward

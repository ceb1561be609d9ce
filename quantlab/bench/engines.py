"""Engines of a bench: what each can load, and how it reads tokens. Runs inside the worker; torch comes with the load.

    quantlab        folders of low bits, with weights that stay packed where the grid allows
    transformers    folders and GGUF files, in bfloat16
    llama_cpp       GGUF files
    parent          any checkpoint that quantlab loads, dequantized where it was quantized, in bfloat16

All run on the CPU.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

from quantlab.errors import UserError
from quantlab.machine import cpu

__all__ = ["LOADERS", "PACKAGES", "Engine", "gguf_file", "reads", "versions"]


class Engine(Protocol):
    """A loaded model with a cache of what it has read."""

    num_entries: int
    """Of the vocabulary."""
    arithmetic: str
    """What it computes in, for people."""

    def start(self, ids: Sequence[int]) -> None:
        """Forget everything and read a prompt, up to the logits of what follows."""

    def step(self, token: int) -> None:
        """Read one more token, up to the logits of what follows."""

    def num_read(self) -> int:
        """Tokens in the cache, as the engine counts them."""


PACKAGES = {
    "quantlab": ("torch", "transformers"),
    "transformers": ("torch", "transformers"),
    "llama_cpp": ("llama_cpp_python",),
    "parent": ("torch", "transformers"),
}
"""Packages whose versions stand beside the figures."""


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path is or holds; the first of a folder's."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    return next(iter(sorted(path.glob("*.gguf"))), None)


def reads(name: str, folder: Path) -> bool:
    """Whether an engine reads that kind of file at all, and is installed."""
    if name == "llama_cpp":
        return gguf_file(folder) is not None and find_spec("llama_cpp") is not None
    return name == "transformers" or gguf_file(folder) is None


class _TorchEngine:
    """A transformers model."""

    def __init__(self, model: Any, arithmetic: str = "bfloat16") -> None:
        self.model, self.arithmetic = model.eval(), arithmetic
        self.num_entries = int(model.get_input_embeddings().weight.shape[0])
        takes = signature(model.forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.cache: Any = None

    def start(self, ids: Sequence[int]) -> None:
        self.cache = None
        # Each time, since some weights appear with the first prompt. A product with a weight that asks for no gradient
        # is the faster one, but for the head's: its input is a slice, for which torch would copy the weight first.
        self.model.requires_grad_(False)
        head = self.model.get_output_embeddings()
        if head is not None and head.weight.is_floating_point():
            head.weight.requires_grad_(True)
        self._read(ids)

    def step(self, token: int) -> None:
        self._read([token])

    def _read(self, ids: Sequence[int]) -> None:
        import torch

        with torch.no_grad():
            out = self.model(
                input_ids=torch.tensor([list(ids)]),
                past_key_values=self.cache,
                use_cache=True,
                **self.options,
            )
            self.cache = out.past_key_values
            if not bool(out.logits[0, -1].isfinite().all()):
                raise UserError("logits must be finite: the model answered with NaN or infinity.")

    def num_read(self) -> int:
        return int(self.cache.get_seq_length())


class _LlamaCpp:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, file: Path, room: int, threads: int) -> None:
        self.arithmetic = "llama.cpp's own: inputs of linears in 8 bits"
        library = import_module("llama_cpp")
        # Kernels for tiles crash in llama.cpp where the system does not allow them.
        if "amx_int8" in cpu()["instruction_sets"]:
            _without_amx(library)
            self.arithmetic += ", without its AMX kernels and repacked weights"
        self.llm = library.Llama(
            model_path=str(file),
            n_gpu_layers=0,
            n_ctx=room,
            n_batch=room,
            n_ubatch=room,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.num_entries = int(self.llm.n_vocab())

    def start(self, ids: Sequence[int]) -> None:
        self.llm.reset()
        self.llm.eval(list(ids))

    def step(self, token: int) -> None:
        self.llm.eval([token])

    def num_read(self) -> int:
        return int(self.llm.n_tokens)


def _without_amx(library: Any) -> None:
    """`Llama` takes no such option, so its defaults are replaced; this process runs nothing else."""
    low_level = library.llama_cpp
    defaults = low_level.llama_model_default_params

    def without_extra_buffers() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    low_level.llama_model_default_params = without_extra_buffers


def _load_transformers(path: Path, room: int, threads: int) -> Engine:
    import torch
    from transformers import AutoModelForCausalLM

    file = gguf_file(path)
    where = {"gguf_file": file.name} if file is not None else {"use_safetensors": True}
    folder = path if path.is_dir() else path.parent
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False, **where
    )
    return _TorchEngine(model)


def _load_parent(path: Path, room: int, threads: int) -> Engine:
    import torch

    from quantlab.config import CheckpointConfig
    from quantlab.models.loading import load_checkpoint

    torch.set_num_threads(threads)
    config = CheckpointConfig(path=str(path), dtype="bfloat16", device="cpu")
    return _TorchEngine(load_checkpoint(config).model)


def _load_quantlab(path: Path, room: int, threads: int) -> Engine:
    import torch

    from quantlab.bench.low_bit import load_packed

    torch.set_num_threads(threads)
    return _TorchEngine(*load_packed(path))


def _load_llama_cpp(path: Path, room: int, threads: int) -> Engine:
    file = gguf_file(path)
    assert file is not None, "llama.cpp is asked for GGUF files only"
    return _LlamaCpp(file, room, threads)


LOADERS: dict[str, Callable[[Path, int, int], Engine]] = {
    "quantlab": _load_quantlab,
    "transformers": _load_transformers,
    "llama_cpp": _load_llama_cpp,
    "parent": _load_parent,
}
"""Engine -> what loads a path, given the tokens that its cache must hold and its threads."""


def versions(name: str) -> dict[str, str]:
    """Versions of the packages that an engine runs on."""
    return {package: version(package) for package in PACKAGES[name]}

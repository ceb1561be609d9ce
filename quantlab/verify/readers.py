"""Which Python has an engine, and what the engine computes in. No torch.

Engines that share quantlab's environment run with this Python; the others with that of `.venv-readers-NAME` in the
repository, which `make readers` builds.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import quantlab
from quantlab.schemes import Scheme
from quantlab.verify.config import VerifyConfig

__all__ = ["arithmetic_of", "engine_file", "python_of"]

ENGINES = Path(__file__).with_name("engines")
"""Where the engines' files are."""
REPOSITORY = Path(quantlab.__file__).parent.parent

_PACKAGES = {
    "transformers": "transformers",
    "quanto": "optimum.quanto",
    "quantlab": "quantlab",
    "llama_cpp": "llama_cpp",
    "gptqmodel": "gptqmodel",
    "auto_gptq": "auto_gptq",
}
"""Engine -> the package without which it cannot run."""
_ENVIRONMENTS = {"gptqmodel": "gptq", "auto_gptq": "autogptq", "llama_cpp": "llamacpp"}
"""Engine -> NAME of its own environment."""
_THROUGH = {"gptq": "gptqmodel", "awq": "gptqmodel"}
"""Format -> the engine that transformers reads it through."""


def engine_file(engine: str) -> Path:
    """The file that starts an engine."""
    return ENGINES / f"{engine}.py"


def python_of(engine: str, format_name: str, config: VerifyConfig) -> Path | None:
    """The Python that has the engine; none where no environment does."""
    if engine in config.environments:
        return config.environments[engine]
    needed = _THROUGH.get(format_name, engine) if engine == "transformers" else engine
    if _is_here(_PACKAGES.get(needed, needed)):
        return Path(sys.executable)
    if needed not in _ENVIRONMENTS:
        return None
    python = REPOSITORY / f".venv-readers-{_ENVIRONMENTS[needed]}" / "bin" / "python"
    return python if python.exists() else None


def arithmetic_of(engine: str, format_name: str, scheme: Scheme) -> str:
    """What an engine computes in, where its file does not say so itself: one of `simulated.ARITHMETICS`."""
    if engine == "llama_cpp":
        return "q8"
    if scheme.rounds_values:
        return "inputs"
    # gptqmodel's kernels for CPUs are of 16 bits, whatever a model is loaded in.
    if engine == "gptqmodel" or (engine == "transformers" and format_name in _THROUGH):
        return "float16"
    # So are those of bitsandbytes: block scales are rounded to bfloat16 before the first product.
    return "bfloat16" if format_name == "bitsandbytes" else "float32"


def _is_here(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False

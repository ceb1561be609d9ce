"""What a bench is asked for. No torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from quantlab.sections import Section

__all__ = ["BenchConfig", "EngineName"]

EngineName = Literal["quantlab", "transformers", "llama_cpp"]


class BenchConfig(Section):
    """Speed and memory of a folder against its 16-bit parent."""

    parent: Path | None = None
    """The checkpoint that the folder was made from: folder or `.gguf` file. None: what the folder's recipe.json names,
    where that is on this machine."""
    engines: tuple[EngineName, ...] = ()
    """Engines that run the folder; none means every one that reads its kind of file."""
    prompt_tokens: int = Field(128, ge=1)
    """Tokens of the prompt, read at once."""
    new_tokens: int = Field(32, ge=2)
    """Tokens that follow, one at a time; the first comes with the prompt."""
    repeats: int = Field(5, ge=2)
    """Processes of each side. Sides take turns."""
    threads: int = Field(1, ge=1)
    """Threads of every engine."""
    clock: Literal["wall", "cpu"] = "wall"
    """`cpu` counts processor time, over threads, in the place of time that passes: for a machine that others use."""
    timeout_s: float = Field(900.0, gt=0)
    """Seconds after which a process is given up."""

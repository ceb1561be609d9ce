"""What `quantlab verify` reads with, and how long it waits."""

from pathlib import Path

from pydantic import Field

from quantlab.config import HellaSwagConfig
from quantlab.sections import Section

__all__ = ["VerifyConfig"]


class VerifyConfig(Section):
    """How a folder is verified."""

    hellaswag: HellaSwagConfig = HellaSwagConfig(limit=20)
    """Documents on which a reader's predictions are compared with ours."""
    engines: tuple[str, ...] | None = None
    """Engines that are started; none means all that the format names as loading here."""
    environments: dict[str, Path] = Field(default_factory=dict)
    """Engine -> the Python that has it; engines that are not named are looked for here and where `make readers` puts
    them."""
    timeout_s: float = Field(1800.0, gt=0)
    """Seconds that one engine may take, loading included."""
    memory_bytes: int | None = Field(None, ge=1)
    """Memory that one engine may hold; none means nine tenths of what is free when it starts. Linux only."""
    threads: int = Field(1, ge=1)
    """Threads of an engine."""
    num_probes: int = Field(2, ge=1)
    """Rows of tokens whose logits and hidden states are compared."""
    probe_tokens: int = Field(64, ge=2)
    """Tokens of such a row at most."""

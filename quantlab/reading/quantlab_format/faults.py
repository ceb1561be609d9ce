"""What a quantization_config must be and is not, in one sentence."""

from typing import Any

from quantlab.errors import CheckpointError

__all__ = ["cut", "odd"]


def odd(name: str, where: str, must: str) -> CheckpointError:
    """That an entry, `name`, of the config.json in `where` must be otherwise."""
    return CheckpointError(f"quantization_config of {where}: {cut(name)} {must}. Export again.")


def cut(found: Any) -> str:
    """A value as a message shows it."""
    text = repr(found)
    return text if len(text) <= 80 else f"{text[:77]}..."

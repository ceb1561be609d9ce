"""Which checkpoint becomes which under another model class, told from its config. No torch."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from quantlab.config import CheckpointConfig
from quantlab.errors import CheckpointError, ConfigError, nearest
from quantlab.export.atomic import check_destination
from quantlab.inspection.checkpoint import CheckpointInfo, inspect_checkpoint

__all__ = ["CONVERSIONS", "TWINS", "check_conversion"]

CONVERSIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"llama": ("quantlab",), "diffllama": ("quantlab",), "quantlab": ("llama", "diffllama")}
)
"""`model_type` of the result -> those that it is made of."""

TWINS = ("standard", "diff_v1")
"""Attention variants of quantlab's own models that transformers has too, as Llama and as DiffLlama."""


def check_conversion(
    source: str, to: str, out_dir: Path, *, fold_gain: bool, overwrite: bool, revision: str | None
) -> CheckpointInfo:
    """Everything that can be told of a conversion before a tensor is read; what the source is.

    Raises:
        ConfigError: no such target, or one that the source cannot become.
        CheckpointError: the source is missing, unsafe, damaged or quantized.
        OutputError: the folder exists, overlaps the source or cannot be written.
    """
    if to not in CONVERSIONS:
        raise ConfigError(
            f"target must be one of {', '.join(CONVERSIONS)}: found {to!r}.{nearest(to, CONVERSIONS)}"
        )
    info = inspect_checkpoint(CheckpointConfig(path=source, revision=revision))
    check_destination(out_dir, overwrite=overwrite, sources=(info.path, *info.files))
    if info.model_type not in CONVERSIONS[to]:
        raise ConfigError(
            f"{to} is made of {' or '.join(CONVERSIONS[to])}: {info.path} is {info.model_type!r}."
        )
    if fold_gain and to != "diffllama":
        raise ConfigError(
            f"a gain is folded on the way to diffllama only: found --to {to}. Leave --fold-gain out."
        )
    if info.kind != "huggingface" or info.source_scheme is not None:
        raise CheckpointError(
            f"conversion needs plain weights in a Hugging Face folder: {info.path} holds {info.source_precision}."
        )
    return info

"""A recipe: the widths that were chosen as a complete run file, for people to read, edit and run. No torch."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from quantlab.config import CheckpointConfig, run_name
from quantlab.errors import OutputError
from quantlab.records import check_writable, write_atomic
from quantlab.schemes import Scheme

__all__ = ["check_recipe", "mixed_scheme", "recipe_text", "write_recipe"]

_LAYER = re.compile(r".*?\.\d+(?=\.)")
"""The part of a linear's name that says its layer."""


def check_recipe(path: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds something, since a recipe may have been edited, or that cannot be written.

    Raises:
        OutputError: says which.
    """
    if path.is_dir():
        raise OutputError(f"a recipe is one file: {path} is a folder. Give -o NAME.yaml.")
    if path.exists() and not overwrite:
        raise OutputError(f"a recipe must not replace a file unasked: {path} exists. Add --overwrite.")
    check_writable(path.absolute().parent)


def mixed_scheme(widths: Sequence[str], method: str) -> str:
    """Name of the scheme: the width that most linears have, the method, and `mixed`."""
    counts = Counter(width for width in widths if width != "w16")
    most = counts.most_common(1)[0][0] if counts else "w8"
    return Scheme(Scheme.parse(most).weights, method=method, mixed=True).name


def write_recipe(path: Path, text: str) -> None:
    """Write a recipe, whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    write_atomic(path, text.encode())


def recipe_text(
    name: str,
    checkpoint: CheckpointConfig,
    scheme: str,
    widths: Mapping[str, str],
    header: Sequence[str],
    skip: Sequence[str] = (),
) -> str:
    """The run file.

    Args:
        widths: linear -> width, in the model's order.
        header: lines that say where the widths come from.
    """
    lines = [f"# {line}" for line in header]
    lines += [f"name: {_quoted(run_name(name))}", "checkpoints:", *_checkpoint(checkpoint)]
    lines += [f"schemes: [{scheme}]", "profile: null", "evaluation:", "  tasks: [hellaswag, perplexity]"]
    lines += ["quantize:", *([f"  skip: {json.dumps(skip, ensure_ascii=False)}"] if skip else [])]
    lines += [
        "  # Any line can be changed; patterns such as '*.down_proj': w8 may follow, the last",
        "  # that matches holds.",
        "  widths:",
    ]
    for layer, items in groupby(widths.items(), lambda item: _layer(item[0])):
        members = list(items)
        counted = Counter(width for _, width in members)
        lines.append(f"    # {layer}: " + ", ".join(f"{count} x {width}" for width, count in counted.items()))
        lines += [f"    {_quoted(linear)}: {width}" for linear, width in members]
    return "\n".join(lines) + "\n"


def _checkpoint(checkpoint: CheckpointConfig) -> list[str]:
    """The checkpoint as an item of a list: its path, and whatever is not the default."""
    said: dict[str, Any] = {"path": checkpoint.path} | checkpoint.model_dump(
        mode="json", exclude_defaults=True
    )
    return [f"  {'-' if key == 'path' else ' '} {key}: {_quoted(value)}" for key, value in said.items()]


def _layer(linear: str) -> str:
    found = _LAYER.match(linear)
    return found.group() if found else "other"


def _quoted(value: Any) -> str:
    """A value as YAML, plain where no reader can take it for anything else."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./:-]*[A-Za-z0-9_/]", value)
    safe = (
        plain
        and ": " not in value
        and value.lower() not in ("null", "true", "false", "yes", "no", "on", "off")
    )
    return value if safe else json.dumps(value, ensure_ascii=False)

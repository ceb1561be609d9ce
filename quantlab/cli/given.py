"""What was given on the command line becomes a configuration.

An option that is not given is None and keeps the configuration's default, so that defaults live in one place.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlab.config import RunConfig

__all__ = ["build", "checkpoint", "count", "given", "sections", "words"]


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave; the others keep the configuration's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def sections(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without the sections in which nothing was given."""
    return {name: value for name, value in options.items() if value != {}}


def checkpoint(
    path: str, device: str | None, dtype: str | None, revision: str | None, trust_remote_code: bool | None
) -> dict[str, Any]:
    return {"path": path} | given(
        device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code or None
    )


def build(
    checkpoints: list[dict[str, Any]],
    tree: Mapping[str, Any],
    out: Path | None,
    overrides: Sequence[str] | None,
    where: str = "options",
    name: str | None = None,
) -> "RunConfig":
    """The configuration of a run, named for its first checkpoint unless `name` is given."""
    from quantlab.config import build_config, run_name

    named = {"name": name or run_name(checkpoints[0]["path"]), "checkpoints": checkpoints} | given(out=out)
    return build_config(dict(tree) | named, overrides or (), where=where)


def count(text: str | None) -> int | str | None:
    """A number where it is one; `auto` stays a word."""
    return int(text) if text is not None and text.isdecimal() else text


def words(text: str | None) -> list[str] | str | None:
    """`a,b` as two words."""
    return text.split(",") if text else text

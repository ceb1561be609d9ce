"""The command line's options: their types with help, and how what was given becomes a configuration.

An option that is not given is None and keeps the configuration's default, so that defaults live in one place.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id (Hugging Face), or .gguf file.")
]
Training = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A training as one file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other field of the configuration."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for records and report [runs/NAME].")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or auto.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
TrustRemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of every draw.")]
Text = Annotated[Path | None, typer.Option(help="UTF-8 text file [WikiText-2 raw test].")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens in a block of text.")]
NumSequences = Annotated[int | None, typer.Option(help="Blocks of text.")]
BatchSize = Annotated[str | None, typer.Option(metavar="N|auto", help="Documents in one forward pass.")]
Workers = Annotated[int | None, typer.Option(help="Processes, each with a model of its own.")]
Limit = Annotated[int | None, typer.Option(help="The first N documents of one fixed permutation.")]
Hessian = Annotated[
    str | None,
    typer.Option(help="Calibration: shared by all schemes, or sequential, each layer on quantized inputs."),
]
Skip = Annotated[list[str] | None, typer.Option(help="Pattern of linears that stay at 16 bits.")]


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


def shared_fields(checkpoints: Any) -> dict[str, Any]:
    """What the checkpoints of a grid's file say besides their path: dtype and device for the models that are swept."""
    first = checkpoints[0] if isinstance(checkpoints, list) and checkpoints else {}
    return {name: value for name, value in first.items() if name in ("dtype", "device")} if first else {}


def build(
    checkpoints: list[dict[str, Any]],
    tree: Mapping[str, Any],
    out: Path | None,
    overrides: list[str] | None,
    where: str = "options",
    name: str | None = None,
) -> Any:
    from quantlab.config import build_config, run_name

    named = {"name": name or run_name(checkpoints[0]["path"]), "checkpoints": checkpoints} | given(out=out)
    return build_config(dict(tree) | named, overrides or (), where=where)


def count(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def dashed(argument: str) -> str:
    """`--batch_size=8` as `--batch-size=8`: the field writes options both ways."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument

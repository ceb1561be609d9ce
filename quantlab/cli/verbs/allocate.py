"""`quantlab allocate`: a width for every linear, under a budget."""

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.given import checkpoint, given, sections
from quantlab.cli.printing import show


def allocate(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Recipe to write, a run file.")],
    bits: Annotated[
        float | None,
        typer.Option(help="Budget: storage bits of a decoder weight on average, scales included."),
    ] = None,
    megabytes: Annotated[
        float | None, typer.Option(help="Budget: MB (10^6 bytes) of the whole model.")
    ] = None,
    widths: Annotated[str | None, typer.Option(help="Candidates [w8,w6,w4g64,w3g64].")] = None,
    method: Annotated[str | None, typer.Option(help="Weight method of the recipe [rtn].")] = None,
    text: Annotated[str | None, typer.Option(help="UTF-8 text file [a held-out text of quantlab].")] = None,
    sequence_length: options.SequenceLength = None,
    num_sequences: options.NumSequences = None,
    seed: options.Seed = None,
    skip: options.Skip = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe if it exists.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """Mixed precision: the width of every linear under a budget, as a recipe that `quantlab run` takes."""
    from quantlab.allocation.allocate import allocate as allocate_widths
    from quantlab.allocation.config import AllocationConfig
    from quantlab.allocation.tables import allocation_table
    from quantlab.progress import counted
    from quantlab.sections import build_section

    blocks = given(path=text, sequence_length=sequence_length, num_sequences=num_sequences, seed=seed)
    tree = given(
        bits=bits,
        megabytes=megabytes,
        method=method,
        skip=skip,
        widths=tuple(widths.split(",")) if widths is not None else None,
        checkpoint=checkpoint(model, device, dtype, revision, trust_remote_code),
    )
    config = build_section(AllocationConfig, tree | sections({"text": blocks}), set_ or ())
    with counted("measuring sensitivities") as advance:
        result = allocate_widths(config, out, overwrite=overwrite, advance=advance)
    show(json_, result, lambda: allocation_table(result))

"""`quantlab export`: the weights that a cell of a run scored, as a folder that other engines load."""

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.given import given
from quantlab.cli.printing import show
from quantlab.cli.running import write_folder


def export(
    run_dir: options.RunDir,
    cell: Annotated[str, typer.Argument(metavar="CELL", help="Scheme that it scored, or a record's key.")],
    format_: options.Format = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write [RUN_DIR/export/SCHEME-FORMAT].")
    ] = None,
    overwrite: options.Overwrite = None,
    max_shard_size: options.MaxShardSize = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """The weights that a run scored, in a folder that other engines load."""
    from quantlab import tables
    from quantlab.export.cell import config_of_cell

    asked = given(format=format_, out=out, overwrite=overwrite, max_shard_size=max_shard_size)
    summary = write_folder(config_of_cell(run_dir, cell, asked, set_ or ()))
    show(json_, summary, lambda: tables.export_table(summary))

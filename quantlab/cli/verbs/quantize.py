"""`quantlab quantize`: a checkpoint's weights under a scheme, as a folder that other engines load."""

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.given import build, checkpoint, given
from quantlab.cli.printing import show
from quantlab.cli.running import write_folder


def quantize(
    model: options.Model,
    scheme: Annotated[str, typer.Option(help="Scheme whose weights are written.")],
    out: options.NewFolder,
    format_: options.Format = None,
    skip: options.Skip = None,
    overwrite: options.Overwrite = None,
    max_shard_size: options.MaxShardSize = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(help="Run folders whose matching scores go on the model card [runs/*]."),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """Low-bit weights in a folder that other engines load."""
    from quantlab import tables

    asked = given(format=format_, overwrite=overwrite, max_shard_size=max_shard_size, records=records)
    config = build(
        [checkpoint(model, device, dtype, revision, trust_remote_code)],
        {
            "profile": None,
            "evaluation": None,
            "quantize": given(skip=skip),
            "export": {"scheme": scheme, "out": out} | asked,
        },
        None,
        set_,
    )
    summary = write_folder(config)
    show(json_, summary, lambda: tables.export_table(summary))

"""`quantlab convert`: the same weights under another model class."""

from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.printing import show


def convert(
    model: options.Model,
    to: Annotated[str, typer.Option(help="llama, diffllama or quantlab.")],
    out: options.NewFolder,
    fold_gain: Annotated[
        bool, typer.Option("--fold-gain", help="To diffllama: the heads' gains go into o_proj.")
    ] = False,
    overwrite: options.Overwrite = None,
    revision: options.Revision = None,
    json_: options.Json = False,
) -> None:
    """The same weights in the layout of Hugging Face's Llama or DiffLlama, or in quantlab's."""
    from quantlab import tables
    from quantlab.inspection.conversions import check_conversion

    check_conversion(model, to, out, fold_gain=fold_gain, overwrite=bool(overwrite), revision=revision)
    # Only now: this imports torch, and a mistake in the options is told before that.
    from quantlab.models.converters import convert_folder

    done = convert_folder(model, to, out, fold_gain=fold_gain, overwrite=bool(overwrite), revision=revision)
    show(json_, done, lambda: tables.listing("convert", {name: str(value) for name, value in done.items()}))

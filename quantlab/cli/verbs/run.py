"""`quantlab run`: everything that one YAML file says."""

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.given import given, sections
from quantlab.cli.running import run_all


def run(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A whole run as one file.")],
    workers: options.Workers = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: options.Out = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """A whole run as one file: profile, sweep, export and report."""
    from quantlab.config import build_config
    from quantlab.sections import merged, read_yaml

    asked = given(out=out) | sections({"sweep": given(workers=workers)})
    places = [f"checkpoints.{name}={value}" for name, value in given(device=device, dtype=dtype).items()]
    tree = merged(read_yaml(config_file), asked)
    run_all(build_config(tree, [*places, *(set_ or ())], where=str(config_file)), json_)

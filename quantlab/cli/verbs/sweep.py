"""`quantlab sweep`: a grid of schemes on several checkpoints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quantlab.cli import options
from quantlab.cli.given import build, checkpoint, count, given, sections, words
from quantlab.cli.running import run_all


def sweep(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Checkpoints to compare.")],
    config_file: Annotated[Path | None, typer.Option("--config", help="YAML file with the grid.")] = None,
    schemes: Annotated[str | None, typer.Option(help="Scheme names, separated by commas.")] = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = None,
    hessian: options.Hessian = None,
    workers: options.Workers = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    out: options.Out = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """Every scheme of a grid, scored on every checkpoint, and a report."""
    from quantlab.config import run_name
    from quantlab.sections import merged, read_yaml

    tree = read_yaml(config_file) if config_file else {}
    places = {"hellaswag": given(limit=limit, seed=seed), "perplexity": given(seed=seed)}
    asked: dict[str, Any] = {
        "evaluation": sections(given(batch_size=count(batch_size)) | places),
        "profile": sections({"text": given(seed=seed)}),
        "sweep": given(workers=workers),
        "quantize": sections({"methods": given(hessian=hessian)}),
    }
    # A section that the file sets to null stays left out.
    kept = {name: value for name, value in sections(asked).items() if tree.get(name, value) is not None}
    shared = _shared_fields(tree.pop("checkpoints", None))
    grid = run_name(str(tree.pop("name", "sweep")))
    config = build(
        [shared | checkpoint(model, device, dtype, revision, trust_remote_code) for model in models],
        merged(tree, kept | given(schemes=words(schemes))),
        out,
        set_,
        where=str(config_file or "options"),
        name=f"{grid}-{run_name(models[0])}",
    )
    run_all(config, json_)


def _shared_fields(checkpoints: Any) -> dict[str, Any]:
    """What the checkpoints of a grid's file say besides their path: dtype and device for the models that are swept."""
    first = checkpoints[0] if isinstance(checkpoints, list) and checkpoints else {}
    return {name: value for name, value in first.items() if name in ("dtype", "device")} if first else {}

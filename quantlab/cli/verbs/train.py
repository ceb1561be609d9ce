"""`quantlab train`: matched models from one YAML file."""

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.given import given, sections
from quantlab.cli.printing import show
from quantlab.errors import TrainingError


def train(
    config_file: options.Training,
    workers: Annotated[int | None, typer.Option(help="Trainings at a time, each in its process.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the trained models [runs/NAME].")
    ] = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """Matched models: variants trained on the same text, in the same order, with as many parameters."""
    from quantlab.sections import build_section, merged, read_yaml
    from quantlab.train.config import TrainConfig
    from quantlab.train.progress import TrainProgress
    from quantlab.train.run import train as train_models
    from quantlab.train.tables import training_result, training_table

    process = given(workers=workers, device=device)
    tree = merged(read_yaml(config_file), sections({"process": process}) | given(out=out))
    config = build_section(TrainConfig, tree, set_ or (), where=str(config_file))
    with TrainProgress(config) as progress:
        outcomes = train_models(config, progress.plan, progress.see, progress.say)
    result = training_result(outcomes, config.folder)
    show(json_, result, lambda: training_table(result))
    if failed := [outcome for outcome in outcomes if outcome.state == "failed"]:
        raise TrainingError(
            f"{len(failed)} of {len(outcomes)} trainings failed: {failed[0].job.title}: {failed[0].message} "
            "The same command tries again from the last checkpoint."
        )

"""`quantlab calibrate`: statistics of activations, or whether the text is enough for them."""

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.given import build, checkpoint, given
from quantlab.cli.printing import show


def calibrate(
    model: options.Model,
    check: Annotated[bool, typer.Option("--check", help="Is this text enough? Stores nothing.")] = False,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file [held-out text of our pair].")] = None,
    text_format: options.TextFormat = None,
    sequence_length: options.SequenceLength = None,
    num_sequences: options.NumSequences = None,
    sampling: options.Sampling = None,
    seed: options.Seed = None,
    stream: Annotated[
        bool | None, typer.Option("--stream", help="Read weights a layer at a time [where memory is short].")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """Statistics of activations for the methods that need them, stored once; or a check of the text."""
    blocks = given(
        path=text,
        format=text_format,
        sequence_length=sequence_length,
        num_sequences=num_sequences,
        sampling=sampling,
        seed=seed,
    )
    config = build(
        [checkpoint(model, device, dtype, revision, trust_remote_code)],
        {"calibration": {"text": blocks} | given(stream=stream)},
        None,
        set_,
    )
    from quantlab.checks import check_calibration

    check_calibration(config)
    # Only now: these import torch, and a mistake in the options is told before that.
    from quantlab.calibration import tables
    from quantlab.calibration.job import calibrate_checkpoint, check_checkpoint
    from quantlab.progress import counted

    with counted("checking" if check else "calibrating") as advance:
        result = (check_checkpoint if check else calibrate_checkpoint)(config, advance)
    show(json_, result, lambda: (tables.check_table if check else tables.calibration_table)(result))

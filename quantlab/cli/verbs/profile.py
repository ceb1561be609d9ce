"""`quantlab profile`: where one checkpoint's outliers are."""

from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.given import build, checkpoint, given
from quantlab.cli.printing import show
from quantlab.cli.running import run_cell


def profile(
    model: options.Model,
    text: options.Text = None,
    text_format: options.TextFormat = None,
    sequence_length: options.SequenceLength = None,
    num_sequences: options.NumSequences = None,
    sampling: options.Sampling = None,
    seed: options.Seed = None,
    top_k: Annotated[int | None, typer.Option(help="Largest magnitudes kept with their place.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    out: options.Out = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """Outliers of one checkpoint: attention logits and hidden states, with their place."""
    from quantlab import tables

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
        {"profile": given(top_k=top_k) | {"text": blocks}, "evaluation": None},
        out,
        set_,
    )
    record, path = run_cell(config, "profile", "w16")
    show(json_, record.result | {"record": str(path)}, lambda: tables.profile_table(record, path))

"""`quantlab evaluate`: what one checkpoint, or one scheme of it, scores."""

from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.given import build, checkpoint, count, given, sections, words
from quantlab.cli.printing import show
from quantlab.cli.running import run_cell


def evaluate(
    model: options.Model,
    scheme: Annotated[str, typer.Option(help="Scheme to score; `quantlab list schemes`.")] = "w16",
    tasks: Annotated[str | None, typer.Option(help="hellaswag,perplexity or one of them.")] = None,
    limit: options.Limit = None,
    items: Annotated[str | None, typer.Option(metavar="A:B", help="HellaSwag documents by position.")] = None,
    hellaswag: options.HellaSwag = None,
    text: options.Text = None,
    text_format: options.TextFormat = None,
    sequence_length: options.SequenceLength = None,
    num_sequences: options.NumSequences = None,
    sampling: Annotated[str | None, typer.Option(help="Blocks of text: draw (seeded), or first.")] = None,
    seed: options.Seed = None,
    bos: Annotated[str | None, typer.Option(help="auto, always or never.")] = None,
    batch_size: options.BatchSize = None,
    kernel: Annotated[str | None, typer.Option(help="integer, or simulated in floats.")] = None,
    hessian: options.Hessian = None,
    skip: options.Skip = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    out: options.Out = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """HellaSwag and perplexity of one checkpoint, or of one scheme of it."""
    from quantlab import tables
    from quantlab.schemes import Scheme

    name = Scheme.parse(scheme).name
    places = {
        "hellaswag": given(path=hellaswag, limit=limit, items=items, seed=seed),
        "perplexity": given(
            path=text,
            format=text_format,
            sequence_length=sequence_length,
            num_sequences=num_sequences,
            sampling=sampling,
            seed=seed,
        ),
    }
    config = build(
        [checkpoint(model, device, dtype, revision, trust_remote_code)],
        {
            "profile": None,
            "schemes": [name],
            "evaluation": given(tasks=words(tasks), bos=bos, batch_size=count(batch_size)) | places,
            "quantize": given(kernel=kernel, skip=skip) | sections({"methods": given(hessian=hessian)}),
        },
        out,
        set_,
    )
    record, path = run_cell(config, "evaluation", name)
    result = {"scheme": name} | record.result | {"record": str(path)}
    show(json_, result, lambda: tables.score_table(record, path))

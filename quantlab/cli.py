"""The command line: `quantlab VERB MODEL [options] [--set section.key=value] [--out DIR]`.

A verb builds a configuration, calls one library function and prints its result: the result on stdout (a table, or one
object with --json), log and progress on stderr. Exit codes: 0 done, 1 a bug of ours, 2 the user's mistake,
130 interrupted. Heavy imports wait inside the verbs, so that `quantlab --help` answers at once.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlab import options
from quantlab.errors import ConfigError, OutputError, TrainingError, UserError
from quantlab.quiet import quiet_imports

app = typer.Typer(
    name="quantlab",
    help="Where are a language model's outliers, what do low bits cost it, and what can be shipped?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it; typer answers with it by itself, or raises, by version."""
USAGE_ERROR: Any = typer.BadParameter.__base__
"""click's UsageError, which typer carries inside itself or imports, by version."""


class Topic(StrEnum):
    """What `quantlab list` lists."""

    schemes = "schemes"
    methods = "methods"
    transforms = "transforms"
    formats = "formats"
    statistics = "statistics"
    variants = "variants"


@app.command()
def profile(
    model: options.Model,
    text: options.Text = None,
    sequence_length: options.SequenceLength = None,
    num_sequences: options.NumSequences = None,
    sampling: Annotated[str | None, typer.Option(help="first, or draw (seeded).")] = None,
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

    blocks = options.given(
        path=text, sequence_length=sequence_length, num_sequences=num_sequences, sampling=sampling, seed=seed
    )
    config = options.build(
        [options.checkpoint(model, device, dtype, revision, trust_remote_code)],
        {"profile": options.given(top_k=top_k) | {"text": blocks}, "evaluation": None},
        out,
        set_,
    )
    record = _execute(config, only=("profile", "w16"))[0]
    path = config.folder / "records" / f"{record.key}.json"
    _show(json_, record.result | {"record": str(path)}, lambda: tables.profile_table(record, path))


@app.command()
def evaluate(
    model: options.Model,
    scheme: Annotated[str, typer.Option(help="Scheme to score; `quantlab list schemes`.")] = "w16",
    tasks: Annotated[str | None, typer.Option(help="hellaswag,perplexity or one of them.")] = None,
    limit: options.Limit = None,
    items: Annotated[str | None, typer.Option(metavar="A:B", help="HellaSwag documents by position.")] = None,
    hellaswag: Annotated[Path | None, typer.Option(help="HellaSwag file [the validation split].")] = None,
    text: options.Text = None,
    sequence_length: options.SequenceLength = None,
    num_sequences: options.NumSequences = None,
    sampling: Annotated[str | None, typer.Option(help="Blocks of text: first, or draw (seeded).")] = None,
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
    blocks = options.given(
        path=text, sequence_length=sequence_length, num_sequences=num_sequences, sampling=sampling, seed=seed
    )
    config = options.build(
        [options.checkpoint(model, device, dtype, revision, trust_remote_code)],
        {
            "profile": None,
            "schemes": [name],
            "evaluation": options.given(
                tasks=tasks and tasks.split(","), bos=bos, batch_size=options.count(batch_size)
            )
            | {
                "hellaswag": options.given(path=hellaswag, limit=limit, items=items, seed=seed),
                "perplexity": blocks,
            },
            "quantize": options.given(kernel=kernel, skip=skip)
            | options.sections({"methods": options.given(hessian=hessian)}),
        },
        out,
        set_,
    )
    record = _execute(config, only=("evaluation", name))[0]
    path = config.folder / "records" / f"{record.key}.json"
    result = {"scheme": name} | record.result | {"record": str(path)}
    _show(json_, result, lambda: tables.score_table(record, path))


@app.command()
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
    places = {"hellaswag": options.given(limit=limit, seed=seed), "perplexity": options.given(seed=seed)}
    asked: dict[str, Any] = {
        "evaluation": options.sections(options.given(batch_size=options.count(batch_size)) | places),
        "profile": options.sections({"text": options.given(seed=seed)}),
        "sweep": options.given(workers=workers),
        "quantize": options.sections({"methods": options.given(hessian=hessian)}),
    }
    # A section that the file sets to null stays left out.
    given = {
        name: value for name, value in options.sections(asked).items() if tree.get(name, value) is not None
    }
    shared = options.shared_fields(tree.pop("checkpoints", None))
    grid = run_name(str(tree.pop("name", "sweep")))
    config = options.build(
        [shared | options.checkpoint(model, device, dtype, revision, trust_remote_code) for model in models],
        merged(tree, given | options.given(schemes=schemes and schemes.split(","))),
        out,
        set_,
        where=str(config_file or "options"),
        name=f"{grid}-{run_name(models[0])}",
    )
    _finish(config, json_)


@app.command()
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

    asked = options.given(out=out) | options.sections({"sweep": options.given(workers=workers)})
    places = [
        f"checkpoints.{name}={value}" for name, value in options.given(device=device, dtype=dtype).items()
    ]
    tree = merged(read_yaml(config_file), asked)
    _finish(build_config(tree, [*places, *(set_ or ())], where=str(config_file)), json_)


@app.command()
def quantize(
    model: options.Model,
    scheme: Annotated[str, typer.Option(help="Scheme whose weights are written.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    format_: Annotated[str | None, typer.Option("--format", help="`quantlab list formats`.")] = None,
    skip: options.Skip = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Replace the folder once the new one is complete.")
    ] = None,
    max_shard_size: Annotated[int | None, typer.Option(help="Bytes of a weight file at most.")] = None,
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

    asked = options.given(format=format_, overwrite=overwrite, max_shard_size=max_shard_size, records=records)
    config = options.build(
        [options.checkpoint(model, device, dtype, revision, trust_remote_code)],
        {
            "profile": None,
            "evaluation": None,
            "quantize": options.given(skip=skip),
            "export": {"scheme": scheme, "out": out} | asked,
        },
        None,
        set_,
    )
    summary = _export(config)
    _show(json_, summary, lambda: tables.export_table(summary))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")],
    cell: Annotated[str, typer.Argument(metavar="CELL", help="Scheme that it scored, or a record's key.")],
    format_: Annotated[str | None, typer.Option("--format", help="`quantlab list formats`.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write [RUN_DIR/export/SCHEME-FORMAT].")
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Replace the folder once the new one is complete.")
    ] = None,
    max_shard_size: Annotated[int | None, typer.Option(help="Bytes of a weight file at most.")] = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """The weights that a run scored, in a folder that other engines load."""
    from quantlab import tables
    from quantlab.export.cell import config_of_cell

    asked = options.given(format=format_, out=out, overwrite=overwrite, max_shard_size=max_shard_size)
    summary = _export(config_of_cell(run_dir, cell, asked, set_ or ()))
    _show(json_, summary, lambda: tables.export_table(summary))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that quantize or export wrote.")],
    limit: options.Limit = None,
    hellaswag: Annotated[Path | None, typer.Option(help="HellaSwag file [the validation split].")] = None,
    engines: Annotated[str | None, typer.Option(help="Engines to start [all that load here].")] = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """Proof that a folder holds the codes that were chosen, and that real engines load it: a certificate."""
    from quantlab.progress import counted
    from quantlab.sections import build_section
    from quantlab.verify.config import VerifyConfig
    from quantlab.verify.tables import certificate_table
    from quantlab.verify.verify import verify as verify_folder

    tree = options.sections({"hellaswag": options.given(limit=limit, path=hellaswag)})
    tree |= options.given(engines=engines and engines.split(","))
    config = build_section(VerifyConfig, tree, set_ or ())
    with counted("verifying") as advance:
        certificate = verify_folder(folder, config, advance)
    _show(json_, certificate.body(), lambda: certificate_table(certificate))
    certificate.check()


@app.command()
def bench(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of low-bit weights, or a .gguf file.")
    ],
    parent: Annotated[
        Path | None, typer.Option(help="The 16-bit checkpoint beside it [what recipe.json names].")
    ] = None,
    engines: Annotated[
        str | None, typer.Option(help="quantlab,transformers,llama_cpp or some of them.")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of the prompt.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens that follow, one at a time.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Processes of each side, in turn.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of every engine.")] = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """Speed and memory of a folder beside its 16-bit parent, on this machine."""
    from quantlab.bench.bench import bench as bench_folder
    from quantlab.bench.config import BenchConfig
    from quantlab.bench.tables import bench_table
    from quantlab.progress import counted
    from quantlab.sections import build_section

    tree = options.given(
        parent=parent,
        engines=engines and engines.split(","),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
    )
    with counted("measuring") as advance:
        result = bench_folder(folder, build_section(BenchConfig, tree, set_ or ()), advance)
    _show(json_, result.summary(), lambda: bench_table(result))


@app.command()
def calibrate(
    model: options.Model,
    check: Annotated[bool, typer.Option("--check", help="Is this text enough? Stores nothing.")] = False,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file [held-out text of our pair].")] = None,
    sequence_length: options.SequenceLength = None,
    num_sequences: options.NumSequences = None,
    sampling: Annotated[str | None, typer.Option(help="first, or draw (seeded).")] = None,
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
    from quantlab.calibration import tables

    blocks = options.given(
        path=text, sequence_length=sequence_length, num_sequences=num_sequences, sampling=sampling, seed=seed
    )
    config = options.build(
        [options.checkpoint(model, device, dtype, revision, trust_remote_code)],
        {"calibration": {"text": blocks} | options.given(stream=stream)},
        None,
        set_,
    )
    from quantlab.calibration.job import calibrate_checkpoint, check_checkpoint
    from quantlab.progress import counted

    with counted("checking" if check else "calibrating") as advance:
        result = (check_checkpoint if check else calibrate_checkpoint)(config, advance)
    _show(json_, result, lambda: (tables.check_table if check else tables.calibration_table)(result))


@app.command()
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

    blocks = options.given(path=text, sequence_length=sequence_length, num_sequences=num_sequences, seed=seed)
    tree = options.given(bits=bits, megabytes=megabytes, method=method, skip=skip) | options.sections(
        {"widths": tuple(widths.split(",")) if widths is not None else {}, "text": blocks}
    )
    tree["checkpoint"] = options.checkpoint(model, device, dtype, revision, trust_remote_code)
    config = build_section(AllocationConfig, tree, set_ or ())
    with counted("measuring sensitivities") as advance:
        result = allocate_widths(config, out, overwrite=overwrite, advance=advance)
    _show(json_, result, lambda: allocation_table(result))


@app.command()
def corpus(config_file: options.Training, set_: options.Set = None, json_: options.Json = False) -> None:
    """Token files and a tokenizer from the texts that a training names; `quantlab train` does it by itself."""
    from quantlab.train.config import load_train_config
    from quantlab.train.corpus import open_corpus
    from quantlab.train.tables import corpus_table

    made = open_corpus(load_train_config(config_file, set_ or ()).corpus, _say)
    result = made.facts | {"corpus": str(made.folder)}
    _show(json_, result, lambda: corpus_table(result))


@app.command()
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
    from quantlab.train.run import train
    from quantlab.train.tables import training_result, training_table

    process = options.given(workers=workers, device=device)
    tree = merged(read_yaml(config_file), options.sections({"process": process}) | options.given(out=out))
    config = build_section(TrainConfig, tree, set_ or (), where=str(config_file))
    with TrainProgress(config) as progress:
        outcomes = train(config, progress.plan, progress.see, progress.say)
    result = training_result(outcomes, config.folder)
    _show(json_, result, lambda: training_table(result))
    if failed := [outcome for outcome in outcomes if outcome.state == "failed"]:
        raise TrainingError(
            f"{len(failed)} of {len(outcomes)} trainings failed: {failed[0].job.title}: {failed[0].message} "
            "The same command tries again from the last checkpoint."
        )


@app.command()
def convert(
    model: options.Model,
    to: Annotated[str, typer.Option(help="llama, diffllama or quantlab.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    fold_gain: Annotated[
        bool, typer.Option("--fold-gain", help="To diffllama: the heads' gains go into o_proj.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder once the new one is complete.")
    ] = False,
    revision: options.Revision = None,
    json_: options.Json = False,
) -> None:
    """The same weights in the layout of Hugging Face's Llama or DiffLlama, or in quantlab's."""
    from quantlab import tables
    from quantlab.models.converters import convert_folder

    done = convert_folder(model, to, out, fold_gain=fold_gain, overwrite=overwrite, revision=revision)
    _show(json_, done, lambda: tables.listing("convert", {name: str(value) for name, value in done.items()}))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")],
    json_: options.Json = False,
) -> None:
    """(Re)build the report of a run from its records."""
    from quantlab import tables

    page = str(_build_report(run_dir))
    _show(json_, {"report": page}, lambda: tables.listing("report", {"report:": page}))


@app.command("list")
def list_(topic: Annotated[Topic, typer.Argument(help="What to list.")], json_: options.Json = False) -> None:
    """What there is, one line each."""
    from quantlab import tables

    lines = _lines_of(topic)
    _show(json_, lines, lambda: tables.listing(topic.value, lines))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a verb and turn its end into an exit code."""
    sys.exit(_exit_code(list(sys.argv[1:] if arguments is None else arguments)))


def _exit_code(arguments: list[str]) -> int:
    quiet_imports()
    try:
        code = app(
            [options.dashed(argument) for argument in arguments], prog_name="quantlab", standalone_mode=False
        )
    except UserError as error:
        return _complain(error, 2)
    except USAGE_ERROR as error:
        error.show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        _complain("interrupted; what was recorded is kept, and the same command goes on from there.", code)
    return code if isinstance(code, int) else 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _complain(message: object, code: int) -> int:
    notes = "".join(f" ({note})" for note in getattr(message, "__notes__", ()))
    sys.stderr.write(f"quantlab: {message}{notes}\n")
    return code


def _execute(config: Any, only: tuple[str, str] | None = None) -> list[Any]:
    from quantlab import pipeline
    from quantlab.progress import RunProgress

    with RunProgress() as progress:
        return pipeline.run(config, progress.watch, only=only)


def _finish(config: Any, json_: bool) -> None:
    """Run everything, write what is to be shipped, build the report, show the scores."""
    from quantlab import tables

    records = _execute(config)
    result: dict[str, Any] = {"run": str(config.folder), "records": [record.key for record in records]}
    if config.export is not None:
        result["export"] = _export(config)
    result["report"] = str(_build_report(config.folder))
    _show(json_, result, lambda: tables.run_table(records, result))


def _export(config: Any) -> dict[str, Any]:
    from quantlab import pipeline
    from quantlab.progress import counted

    with counted(f"writing {config.export.scheme}") as advance:
        return pipeline.export(config, advance)


def _build_report(run_dir: Path) -> Path:
    try:
        from reports.page import build_report
    except ImportError as error:
        raise ConfigError(
            f"reports need the packages of quantlab[report]: {error.name} is missing."
        ) from error
    return build_report(run_dir)


def _lines_of(topic: Topic) -> dict[str, str]:
    if topic in (Topic.schemes, Topic.methods, Topic.transforms):
        from quantlab.schemes import catalogue
        from quantlab.schemes.places import explained

        if topic is Topic.schemes:
            return catalogue.SCHEMES | explained() | catalogue.explained()
        words = catalogue.METHODS if topic is Topic.methods else catalogue.TRANSFORMS
        return {name: word.summary for name, word in words.items()}
    if topic is Topic.formats:
        from quantlab.export.formats import FORMATS

        return {name: form.description for name, form in FORMATS.items()}
    if topic is Topic.variants:
        from quantlab.attention.variants import VARIANTS

        return {name: variant.summary for name, variant in VARIANTS.items()}
    from probes.catalogue import STATISTICS

    return STATISTICS


def _show(as_json: bool, result: Any, table: Callable[[], Any]) -> None:
    """The result on stdout, as one JSON object or as a table for people."""
    try:
        if as_json:
            sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        else:
            from rich.console import Console

            wide = None if sys.stdout.isatty() else 160
            Console(soft_wrap=wide is not None, width=wide, highlight=False).print(table())
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OutputError(
                f"stdout must be writable: {error.strerror}. What was recorded is kept."
            ) from error

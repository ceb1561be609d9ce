"""The main path, in the order in which data moves:

    checkpoint -> profile -> (for each scheme) quantize -> evaluate -> record -> export

`run` does a whole run: everything that headers, configs, names and paths can tell is checked first; then each cell
that has no record yet goes to the sweep's workers and leaves one. `profile_cell` and `evaluate_cell` are what a worker
does: functions of a checkpoint, a configuration and a scheme. torch is imported only after the checks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any, Literal

from quantlab.config import CheckpointConfig, EvaluationConfig, ProfileConfig, RunConfig
from quantlab.data.hellaswag import load_hellaswag, select
from quantlab.data.text import check_text, text_blocks
from quantlab.errors import RecordError
from quantlab.export.atomic import check_destination
from quantlab.export.formats import find_format
from quantlab.models.inspection import CheckpointInfo, content_hash, inspect_checkpoint
from quantlab.models.precision import stored_precision
from quantlab.records import Record, check_writable, read_records, read_run, record_key, source_hash
from quantlab.schemes import Scheme, check_shapes
from quantlab.sweep.executors import Advance, Event, run_cells
from quantlab.sweep.plan import Cell, document_tokens, plan
from quantlab.sweep.store import RunStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantlab.models.loading import Checkpoint

Items = dict[str, dict[str, "NDArray[Any]"]]
"""Columns of per-item results of each task."""

OnStart = Callable[[Sequence[Cell]], Callable[[Event], None]]
"""Told which cells will be computed; returns the listener to what happens to them."""


def run(config: RunConfig, watching: OnStart, only: str | None = None) -> list[Record]:
    """Compute every cell of a run that has no record yet; returns all its records, in the order of the plan.

    Args:
        watching: told what will be computed, for progress.
        only: a scheme; then the other schemes of the configuration are left out, and records of other
            configurations in the same folder stay part of the run.

    Raises:
        UserError: a fault of checkpoint, scheme, data or place, found before anything is computed where possible.
    """
    infos, data = check(config)
    check_writable(config.folder)
    jobs = [
        job
        for job in _jobs(config, infos, data)
        if job.cell.kind == "profile" or only in (None, job.cell.scheme)
    ]
    store = RunStore(config.folder)
    store.open(config.model_dump(mode="json"), [*_others(config.folder, only), *(job.key for job in jobs)])
    missing = [job for job in jobs if not store.has(job.key)]
    listener = watching([job.cell for job in missing])
    run_cells(missing, run_job, workers=config.sweep.workers, threads=config.sweep.threads, on_event=listener)
    records = {record.key: record for record in read_records(config.folder)}
    return [records[job.key] for job in jobs]


def check(config: RunConfig) -> tuple[list[CheckpointInfo], dict[str, str]]:
    """Everything that can be told without torch: checkpoints, schemes against shapes, data files, format.

    Returns:
        What each checkpoint is, and the SHA-256 of the data of each task.
    """
    infos = [inspect_checkpoint(checkpoint) for checkpoint in config.checkpoints]
    for info in infos:
        for name in config.schemes:
            check_shapes(Scheme.parse(name), info.linears, config.quantize.skip)
    if config.export is not None:
        find_format(config.export.format).check(Scheme.parse(config.export.scheme))
    return infos, _data(config.profile, config.evaluation)


def profile_cell(
    checkpoint: "Checkpoint", config: ProfileConfig, advance: Advance
) -> tuple[dict[str, Any], Items]:
    """Outliers of a checkpoint over a text: the record's result and its histograms."""
    from probes.profile import profile

    blocks = text_blocks(config.text, checkpoint.tokenizer, num_embeddings=_num_embeddings(checkpoint))
    length = config.text.sequence_length
    outliers = profile(
        checkpoint.model,
        blocks.ids_NT,
        top_k=config.top_k,
        statistics=config.statistics,
        decode=checkpoint.tokenizer.decode,
        advance=lambda count: advance(count * length),
    )
    text = {"source": blocks.source, "sha256": blocks.sha256, "num_tokens": int(blocks.ids_NT.size)}
    return outliers.summary() | {"text": text}, {"profile": outliers.items()}


def evaluate_cell(
    checkpoint: "Checkpoint", scheme: Scheme, config: RunConfig, advance: Advance
) -> tuple[dict[str, Any], Items]:
    """Scores of a checkpoint under a scheme: the record's result and the per-item scores of each task."""
    import torch

    from quantlab.quantize import quantized

    assert config.evaluation is not None
    model, quantize = checkpoint.model, config.quantize
    loaded = str(model.dtype).removeprefix("torch.")
    scale_dtype = getattr(torch, stored_precision(loaded, checkpoint.info.source_precision))
    scores: dict[str, Any] = {}
    with quantized(
        model, scheme, skip=quantize.skip, kernel=quantize.kernel, scale_dtype=scale_dtype
    ) as changes:
        for task in config.evaluation.tasks:
            scores[task] = _TASKS[task](checkpoint, scheme, config.evaluation, advance)
    result = {"quantization": changes.summary()} | {task: score.summary() for task, score in scores.items()}
    if "hellaswag" in result:
        result["hellaswag"]["sharing_because"] = _sharing(checkpoint, scheme)[1]
    return result, {task: score.items() for task, score in scores.items()}


def export(config: RunConfig, advance: Advance) -> dict[str, Any]:
    """Write the first checkpoint's low-bit weights; the card's scores come from matching records only."""
    assert config.export is not None
    wanted, scheme = config.export, Scheme.parse(config.export.scheme)
    out = wanted.out or config.folder / "export" / f"{scheme.name}-{wanted.format}"
    overwrite = wanted.overwrite or wanted.out is None
    check_destination(out, overwrite=overwrite)
    check(config)
    from quantlab.export.folder import export_checkpoint
    from quantlab.models.loading import load_checkpoint

    summary = export_checkpoint(
        load_checkpoint(config.checkpoints[0]),
        scheme,
        wanted.format,
        out,
        skip=config.quantize.skip,
        records=[record for folder in (config.folder, *wanted.records) for record in _readable(folder)],
        overwrite=overwrite,
        max_shard_size=wanted.max_shard_size,
        advance=advance,
    )
    return summary.summary()


@dataclass(frozen=True)
class Job:
    """A cell with all that a worker needs to compute and record it."""

    cell: Cell
    config: RunConfig
    made_by: dict[str, Any]
    """What the record's key is the hash of."""

    @property
    def key(self) -> str:
        """The record's key, known before it is computed."""
        return record_key(self.cell.kind, self.made_by)


def run_job(job: Job, advance: Advance) -> None:
    """Compute one cell and leave its record, unless another process has done so meanwhile."""
    store = RunStore(job.config.folder)
    with store.claim(job.key) as missing:
        if not missing:
            return
        content, source = (
            job.made_by["checkpoint"]["content_hash"],
            job.config.checkpoints[job.cell.checkpoint],
        )
        checkpoint = _loaded(content, source, job.config.sweep.threads)
        wall, cpu = perf_counter(), process_time()
        if job.cell.kind == "profile":
            assert job.config.profile is not None
            result, items = profile_cell(checkpoint, job.config.profile, advance)
        else:
            result, items = evaluate_cell(checkpoint, Scheme.parse(job.cell.scheme), job.config, advance)
        record = Record.of(job.cell.kind, job.made_by, job.config.recorded(), result)
        store.put(record, items, _sidecar(perf_counter() - wall, process_time() - cpu))


@lru_cache(maxsize=1)
def _loaded(content: str, config: CheckpointConfig, threads: int) -> "Checkpoint":
    """The checkpoint of this content that this process works on; the next one replaces it."""
    import torch

    from quantlab.models.loading import load_checkpoint

    torch.set_num_threads(threads)
    return load_checkpoint(config)


def _hellaswag(checkpoint: "Checkpoint", scheme: Scheme, config: EvaluationConfig, advance: Advance) -> Any:
    from quantlab.evaluation.hellaswag import evaluate_hellaswag

    return evaluate_hellaswag(
        checkpoint.model,
        checkpoint.tokenizer,
        config.hellaswag,
        share_context=_sharing(checkpoint, scheme)[0],
        batch_size=_batch_size(scheme, config),
        bos=config.bos,
        advance=lambda count: advance(count * document_tokens(scheme)),
    )


def _perplexity(checkpoint: "Checkpoint", scheme: Scheme, config: EvaluationConfig, advance: Advance) -> Any:
    from quantlab.evaluation.perplexity import evaluate_perplexity

    blocks = text_blocks(config.perplexity, checkpoint.tokenizer, num_embeddings=_num_embeddings(checkpoint))
    return evaluate_perplexity(
        checkpoint.model,
        blocks,
        batch_size=_batch_size(scheme, config),
        advance=lambda count: advance(count * config.perplexity.sequence_length),
    )


def _sharing(checkpoint: "Checkpoint", scheme: Scheme) -> tuple[bool, str]:
    """Whether the four endings of a document share its context in one row, and why."""
    if scheme.spans_sequence:
        return False, f"a scale of {scheme.name} spans the tokens of a sequence"
    model_type = checkpoint.model.config.model_type
    if not checkpoint.family.packable:
        return False, f"the family {model_type} is not declared packable"
    return True, f"the family {model_type} is declared packable"


def _batch_size(scheme: Scheme, config: EvaluationConfig) -> int | Literal["auto"]:
    """Documents in one forward pass: what is asked for, but one by one where a scheme rounds while it runs.

    Products of other shapes round their last bit otherwise. Of float weights that moves a score by 1e-5 nats; a scheme
    that rounds activations makes whole steps of it, and its scores would depend on their neighbours.
    """
    return 1 if scheme.rounds_values else config.batch_size


_TASKS = {"hellaswag": _hellaswag, "perplexity": _perplexity}


def _jobs(config: RunConfig, infos: Sequence[CheckpointInfo], data: dict[str, str]) -> list[Job]:
    """Every cell of the run with what makes its record."""
    from quantlab.models.loading import resolve_device, resolve_dtype

    sources = []
    for checkpoint, info in zip(config.checkpoints, infos, strict=True):
        device = resolve_device(checkpoint.device)
        dtype = str(resolve_dtype(checkpoint.dtype, device)).removeprefix("torch.")
        known: dict[str, Any] = {
            "name": info.name,
            "content_hash": content_hash(info),
            "architecture": info.architecture,
        }
        known |= {"num_parameters": info.num_parameters, "source_precision": info.source_precision}
        known |= {"source_scheme": info.source_scheme, "device": device.type, "dtype": dtype}
        sources.append(known)
    return [
        Job(cell, config, _made_by(cell, config, sources[cell.checkpoint], data)) for cell in plan(config)
    ]


def _made_by(cell: Cell, config: RunConfig, source: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    """What a record is the result of. Batch size, workers and the places of files are absent: they change no score."""
    libraries = {name: version(name) for name in ("torch", "transformers")}
    made_by: dict[str, Any] = {"checkpoint": source, "code": source_hash(), "libraries": libraries}
    if cell.kind == "profile":
        assert config.profile is not None
        settings = config.profile.model_dump(mode="json", exclude={"text": {"path"}})
        return made_by | {"profile": settings, "data": {"profile": data["profile"]}}
    assert config.evaluation is not None
    tasks = config.evaluation.tasks
    settings = {
        task: getattr(config.evaluation, task).model_dump(mode="json", exclude={"path"}) for task in tasks
    }
    return made_by | {
        "scheme": cell.scheme,
        "quantize": {
            "skip": sorted(config.quantize.skip),
            "scale_dtype": stored_precision(source["dtype"], source["source_precision"]),
        },
        "kernel": config.quantize.kernel,
        "evaluation": settings,
        "bos": config.evaluation.bos,
        "data": {task: data[task] for task in tasks},
    }


def _data(profile: ProfileConfig | None, evaluation: EvaluationConfig | None) -> dict[str, str]:
    """Check the files of texts and tasks; their SHA-256 by task."""
    data: dict[str, str] = {}
    if profile is not None:
        data["profile"] = check_text(profile.text)
    if evaluation is not None and "perplexity" in evaluation.tasks:
        data["perplexity"] = check_text(evaluation.perplexity)
    if evaluation is not None and "hellaswag" in evaluation.tasks:
        dataset = load_hellaswag(evaluation.hellaswag.path)
        select(dataset.documents, evaluation.hellaswag)
        data["hellaswag"] = dataset.sha256
    return data


def _num_embeddings(checkpoint: "Checkpoint") -> int:
    rows: int = checkpoint.model.get_input_embeddings().weight.shape[0]
    return rows


def _others(folder: Path, only: str | None) -> list[str]:
    """Keys that the run at the folder already plans and that stay planned."""
    if only is None or not (folder / "run.json").exists():
        return []
    try:
        return list(read_run(folder)["records"] or ())
    except RecordError:
        return []


def _readable(folder: Path) -> list[Record]:
    try:
        return read_records(folder)
    except RecordError:
        return []


def _sidecar(wall_seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """What two runs of the same cell do not share."""
    import platform
    from datetime import UTC, datetime

    import torch

    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "wall_s": round(wall_seconds, 3),
        "cpu_s": round(cpu_seconds, 3),
    }

"""The main path, in the order in which data moves:

    checkpoint -> profile -> calibrate -> (for each scheme) quantize -> evaluate -> record -> export

`run` does a whole run: everything that can be told is checked first (`checks`); then each cell that has no record yet
goes to the sweep's workers and leaves one. `profile_cell` and `evaluate_cell` are what a worker
does: functions of a checkpoint, a configuration and a scheme. torch is imported only after the checks.
"""

import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

from quantlab.checks import check, export_folder
from quantlab.config import CheckpointConfig, ProfileConfig, RunConfig
from quantlab.data.text import text_blocks
from quantlab.errors import ConfigError, RecordError, SchemeError
from quantlab.machine import cpu
from quantlab.records import Record, check_writable, read_record, read_records
from quantlab.schemes import Scheme
from quantlab.sweep.executors import Advance, Event, run_cells
from quantlab.sweep.jobs import Job, jobs_of, made_of_weights
from quantlab.sweep.plan import Cell, plan
from quantlab.sweep.store import RunStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantlab.models.loading import Checkpoint
    from quantlab.solutions import SolutionStore

Items = dict[str, dict[str, "NDArray[Any]"]]
"""Columns of per-item results of each task."""

Watch = Callable[[Sequence[Cell]], Callable[[Event], None]]
"""Told which cells will be computed; returns the listener to what happens to them."""


def run(config: RunConfig, watch: Watch, only: tuple[str, str] | None = None) -> list[Record]:
    """Compute every cell of a run that has no record yet; returns all its records, in the order of the plan.

    Args:
        watch: told what will be computed, for progress.
        only: (kind, scheme) of the one cell that is wanted of each checkpoint. It joins the run that is in the folder.

    Raises:
        UserError: a fault of checkpoint, scheme, data or place, found before anything is computed where possible.
    """
    if not any(_wanted(cell, only) for cell in plan(config)):
        raise ConfigError("a run must have something to compute: the configuration leaves it out.")
    infos, data, num_documents = check(config)
    check_writable(config.folder)
    jobs = [job for job in jobs_of(config, infos, data, num_documents) if _wanted(job.cell, only)]
    store = RunStore(config.folder)
    keys = list(dict.fromkeys(job.key for job in jobs))
    store.open(config.model_dump(mode="json"), keys, joining=only is not None)
    missing = list({job.key: job for job in jobs if not store.has(job.key)}.values())
    listener = watch([job.cell for job in missing])
    run_cells(missing, run_job, workers=config.sweep.workers, threads=config.sweep.threads, on_event=listener)
    return [read_record(store.path(key)) for key in keys]


def profile_cell(
    checkpoint: "Checkpoint", config: ProfileConfig, advance: Advance
) -> tuple[dict[str, Any], Items]:
    """Outliers of a checkpoint over a text: the record's result and its histograms."""
    from probes.profile import profile

    rows = checkpoint.model.get_input_embeddings().weight.shape[0]
    blocks = text_blocks(config.text, checkpoint.tokenizer, num_embeddings=rows)
    outliers = profile(
        checkpoint.model,
        blocks.ids_NT,
        top_k=config.top_k,
        statistics=config.statistics,
        decode=checkpoint.tokenizer.decode,
        advance=lambda count: advance(count * config.text.sequence_length),
    )
    text = blocks.facts() | {"num_tokens": int(blocks.ids_NT.size)}
    summary = outliers.summary() | {"text": text, "attention": _attention(checkpoint, sites=True)}
    return summary, {"profile": outliers.items()}


def evaluate_cell(
    checkpoint: "Checkpoint",
    scheme: Scheme,
    config: RunConfig,
    advance: Advance,
    solutions: "SolutionStore | None" = None,
) -> tuple[dict[str, Any], Items]:
    """Scores of a checkpoint under a scheme: the record's result and the per-item scores of each task.

    Args:
        solutions: where codes that took long are kept, for the other cells of a sweep.
    """
    from quantlab.calibration.calibrator import calibrator_of
    from quantlab.evaluation.tasks import TASKS
    from quantlab.layers.linear import outlier_columns
    from quantlab.quantize import quantized

    assert config.evaluation is not None
    model = checkpoint.model
    calibrator = calibrator_of(checkpoint, config.calibration) if scheme.needs else None
    with quantized(
        model,
        scheme,
        config.quantize,
        calibrator=calibrator,
        solutions=solutions,
    ) as changes:
        # A folder of low-bit weights carries a scheme of its own, which decides on the layout as any other.
        carried = checkpoint.scheme or scheme
        scores, shares = {}, {}
        for task in config.evaluation.tasks:
            scores[task] = TASKS[task](checkpoint, carried, config.evaluation, advance)
            shares[task] = _cached_share(model, carried, task)
        outliers = outlier_columns(model)
    result: dict[str, Any] = {
        "quantization": changes.summary(),
        **({"calibration": calibrator.summary()} if calibrator else {}),
        **({"outlier_columns": outliers} if outliers else {}),
        **({"cached_share": shares} if any(shares.values()) else {}),
        "attention": _attention(checkpoint, sites=bool(carried.sites or carried.head_sites)),
        **{task: score.summary() for task, score in scores.items()},
    }
    return result, {task: score.items() for task, score in scores.items()}


def _cached_share(model: Any, scheme: Scheme, task: str) -> float | None:
    """Of what queries read during a task, the share that came from the quantized cache; None without a window.

    Raises:
        SchemeError: nothing did.
    """
    from quantlab.layers.kv_cache import cached_share_

    share = cached_share_(model)
    if share == 0:
        assert scheme.cache is not None
        raise SchemeError(
            f"{scheme.name} leaves the last {scheme.cache.window} tokens as they are, so some text must be longer: "
            f"none of {task} is, and nothing was quantized. Take a shorter window, longer blocks "
            "(evaluation.perplexity.sequence_length), or leave the task out."
        )
    return None if share is None else round(share, 6)


def _attention(checkpoint: "Checkpoint", *, sites: bool) -> str:
    """What computed attention: the blocks that have sites, or the model's own kernel."""
    from quantlab.attention.backends import BLOCKS
    from quantlab.models.modeling import attention_backend

    return f"{BLOCKS}, with sites" if sites else attention_backend(checkpoint.model)


def export(config: RunConfig, advance: Advance) -> dict[str, Any]:
    """Write a checkpoint's low-bit weights; the card's scores come from matching records only."""
    if config.export is None:
        raise ConfigError("an export needs the section 'export', which the configuration sets to null.")
    _, data, _ = check(config)
    records = _records_for_card(config)
    from quantlab.calibration.calibrator import calibrator_of
    from quantlab.export.folder import export_checkpoint
    from quantlab.models.loading import load_checkpoint

    checkpoint, scheme = (
        load_checkpoint(config.checkpoints[config.exported]),
        Scheme.parse(config.export.scheme),
    )
    summary = export_checkpoint(
        checkpoint,
        scheme,
        config.export.format,
        export_folder(config),
        config=config.quantize,
        calibrator=calibrator_of(checkpoint, config.calibration) if scheme.needs else None,
        made_by=made_of_weights(scheme, config, data),
        records=records,
        overwrite=config.export.overwrite or config.export.out is None,
        max_shard_size=config.export.max_shard_size,
        advance=advance,
    )
    return summary.summary()


def run_job(job: Job, advance: Advance) -> None:
    """Compute one cell and leave its record, unless another process has done so meanwhile."""
    import torch

    from quantlab.solutions import SolutionStore

    torch.set_num_threads(job.config.sweep.threads)
    store = RunStore(job.config.folder)
    with store.claim(job.key) as missing:
        if not missing:
            return
        job.check_inputs()
        checkpoint = _loaded(job.made_by["checkpoint"]["content_hash"], job.checkpoint)
        wall, cpu = perf_counter(), process_time()
        if job.cell.kind == "profile":
            assert job.config.profile is not None
            result, items = profile_cell(checkpoint, job.config.profile, advance)
        else:
            schemes = tuple(map(Scheme.parse, job.own.schemes))
            solutions = SolutionStore(job.config.folder / "solutions", job.weights_made_by, schemes)
            scheme = Scheme.parse(job.cell.scheme)
            result, items = evaluate_cell(checkpoint, scheme, job.own, advance, solutions)
        job.check_inputs()
        record = Record.of(job.cell.kind, job.made_by, job.config.recorded(), result)
        spent = {"wall_s": round(perf_counter() - wall, 3), "cpu_s": round(process_time() - cpu, 3)}
        store.put(record, items, _circumstances(checkpoint, result) | spent)


_IN_MEMORY: "dict[tuple[str, CheckpointConfig], Checkpoint]" = {}
"""The one checkpoint that this process works on."""


def _loaded(content: str, config: CheckpointConfig) -> "Checkpoint":
    """The checkpoint of this content; the one before it leaves memory first."""
    from quantlab.models.loading import load_checkpoint

    if (content, config) not in _IN_MEMORY:
        _IN_MEMORY.clear()
        _IN_MEMORY[content, config] = load_checkpoint(config)
    return _IN_MEMORY[content, config]


def _wanted(cell: Cell, only: tuple[str, str] | None) -> bool:
    return only is None or (cell.kind, cell.scheme) == only


def _records_for_card(config: RunConfig) -> list[Record]:
    """Records of the folders that the user names, else of this run and its neighbours, as far as they can be read."""
    assert config.export is not None
    if config.export.records is not None:
        return [record for folder in config.export.records for record in read_records(folder)]
    found: list[Record] = []
    for folder in (config.folder, *sorted(Path("runs").glob("*/"))):
        with suppress(RecordError):
            found += read_records(folder)
    return found


def _circumstances(checkpoint: "Checkpoint", result: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same cell do not share."""
    import torch

    from quantlab.kernels.product import backend_of

    kernels = result.get("quantization", {}).get("kernels", {})
    integers = not kernels.keys().isdisjoint(("int8_mm", "llm_int8"))
    device = checkpoint.model.device
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "machine": platform.machine(),
        "cpu": cpu()
        | {"torch": torch.backends.cpu.get_cpu_capability(), "onednn": torch.backends.mkldnn.enabled},
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        **({"integer_product": backend_of(device)} if integers else {}),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }

"""A cell with all that a worker needs, and what its record's key is the hash of.

A key covers the checkpoint's content, dtype and kind of device, the scheme, the skipped linears, the kernel, the dtype
of scales, the calibration and the settings of methods and transforms where the scheme has any, the data's content and
which of it, the BOS policy, the libraries and the sources of quantlab. Its section `computation` holds what
moves the last digits of this cell's scores: threads and batch sizes. Schemes that round values are scored one document
at a time, to the same bits for any of them, and have no such section unless calibration or a method made their codes.
Workers, names and the places of files are absent: they are not what a score is the result of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from quantlab.config import CheckpointConfig, RunConfig
from quantlab.data.unchanged import check_data
from quantlab.inspection.checkpoint import CheckpointInfo, contents_of
from quantlab.inspection.contents import Contents
from quantlab.inspection.precision import stored_precision
from quantlab.records import COMPUTATION, record_key, source_hash
from quantlab.schemes import METHODS, Scheme
from quantlab.sweep.plan import Cell, plan

_NOT_THE_TEXT = {"path", "format"}
"""Of a text's settings, those that its digest stands for."""
_ELSEWHERE: dict[str, Any] = {"text": _NOT_THE_TEXT, "batch_size": True, "stream": True, "cache": True}
"""Of a calibration's settings, those that are no part of what it is of."""
_KERNELS = ("flash_attn",)
"""Libraries whose presence alone changes what computes."""


@dataclass(frozen=True)
class Job:
    """One cell of a run, ready to be computed."""

    cell: Cell
    config: RunConfig
    made_by: dict[str, Any]
    """What the record's key is the hash of."""
    contents: Contents | None = None
    """Files of the checkpoint as they were when the key was made."""

    @property
    def key(self) -> str:
        """The record's key, known before it is computed."""
        return record_key(self.cell.kind, self.made_by)

    def check_inputs(self) -> None:
        """Refuse inputs that are no longer what the key was made of; before they are read, and before it is recorded.

        Raises:
            CheckpointError, DataError: a file of the checkpoint, or a text or HellaSwag file, has other bytes.
        """
        if self.contents is not None:
            self.contents.check()
        data = dict(self.made_by.get("data", {}))
        if "calibration" in self.made_by:
            data["calibration"] = self.made_by["calibration"]["data"]
        for task, sha256 in data.items():
            check_data(self.own, task, sha256)

    @property
    def weights_made_by(self) -> dict[str, Any]:
        """What codes of weights are the result of, but for the scheme."""
        names = (
            "checkpoint",
            "code",
            "libraries",
            "quantize",
            "calibration",
            "method",
            "transforms",
            "widths",
        )
        made = {name: self.made_by[name] for name in names if name in self.made_by}
        # Of every scheme alike, so that those of one grid share their codes.
        return made | {COMPUTATION: _of_codes(self.config, calibrated="calibration" in made)}

    @property
    def checkpoint(self) -> CheckpointConfig:
        """The checkpoint as it was asked for."""
        return self.config.checkpoints[self.cell.checkpoint]

    @property
    def own(self) -> RunConfig:
        """The run as it is for this checkpoint."""
        return self.config.of(self.cell.checkpoint)


def jobs_of(
    config: RunConfig, infos: Sequence[CheckpointInfo], data: Mapping[str, str], num_documents: int | None
) -> list[Job]:
    """Every cell of the run, in the order of the plan.

    Args:
        infos: what each checkpoint is.
        data: SHA-256 of the data of each task.
        num_documents: HellaSwag documents that are selected, for the plan's costs.
    """
    contents = [contents_of(info) for info in infos]
    sources = [_source(*each) for each in zip(config.checkpoints, infos, contents, strict=True)]
    libraries = {name: version(name) for name in ("torch", "transformers", *_KERNELS) if find_spec(name)}
    jobs = []
    for cell in plan(config, num_documents):
        source = sources[cell.checkpoint]
        shared = {"checkpoint": source, "code": source_hash(), "libraries": libraries}
        settings = _of_profile if cell.kind == "profile" else _of_evaluation
        made_by = shared | settings(cell, config.of(cell.checkpoint), source, data)
        how = _computation(cell, config, infos[cell.checkpoint].carries, source["device"])
        made_by |= {COMPUTATION: how} if how else {}
        jobs.append(Job(cell, config, made_by, contents[cell.checkpoint]))
    return jobs


def _source(checkpoint: CheckpointConfig, info: CheckpointInfo, contents: Contents) -> dict[str, Any]:
    from quantlab.models.loading import resolve_device, resolve_dtype

    device = resolve_device(checkpoint.device)
    return {
        "name": info.name,
        "content_hash": contents.sha256,
        "architecture": info.architecture,
        "num_parameters": info.num_parameters,
        "source_precision": info.source_precision,
        "source_scheme": info.source_scheme,
        "device": device.type,
        "dtype": str(resolve_dtype(checkpoint.dtype, device)).removeprefix("torch."),
    }


def made_of_weights(scheme: Scheme, config: RunConfig, data: Mapping[str, str]) -> dict[str, Any]:
    """What made codes and ranges beyond the scheme's name; only what the scheme has."""
    made: dict[str, Any] = {}
    methods = config.quantize.methods
    if scheme.needs:
        settings = config.calibration.model_dump(mode="json", exclude=_ELSEWHERE)
        made["calibration"] = settings | {"data": data["calibration"]}
    own = getattr(methods, scheme.method, None)
    settings = {} if own is None else own.model_dump(mode="json")
    if METHODS[scheme.method].needs or (scheme.weights is not None and scheme.reads_inputs):
        settings |= {"hessian": methods.hessian}
    if scheme.method != "rtn" or settings:
        made["method"] = settings
    if set(scheme.transforms) - {"bias"}:
        made["transforms"] = config.quantize.transforms.model_dump(mode="json")
    if scheme.mixed:
        # In order: where several patterns match, the last one holds.
        made["widths"] = [list(item) for item in config.quantize.widths.items()]
    return made


def _computation(cell: Cell, config: RunConfig, carries: str | None, device: str) -> dict[str, Any]:
    """What moves the last digits of a cell's result.

    Args:
        carries: scheme of a folder of low-bit weights, which decides on the layout as any other.
    """
    scheme = Scheme.parse(cell.scheme)
    layout = Scheme.parse(carries or cell.scheme)
    how: dict[str, Any] = {}
    if scheme.needs or scheme.method != "rtn":
        how |= _of_codes(config, calibrated=bool(scheme.needs))
    if cell.kind == "profile" or not layout.rounds_values:
        how |= {"threads": config.sweep.threads}
    if cell.kind == "evaluation" and not layout.rounds_values:
        assert config.evaluation is not None
        how |= {"batch_size": config.evaluation.batch_size}
    # What is summed on a GPU is not divided among threads of the CPU.
    return how if device == "cpu" else {name: value for name, value in how.items() if name != "threads"}


def _of_codes(config: RunConfig, *, calibrated: bool) -> dict[str, Any]:
    """What moves the codes of a method that sums, and the statistics that it reads."""
    sizes = {"calibration_batch_size": config.calibration.batch_size} if calibrated else {}
    return {"threads": config.sweep.threads} | sizes


def _scale_dtype(config: RunConfig, source: Mapping[str, Any]) -> str:
    """As `models.stored.scale_dtype_of` has it, before the model is loaded."""
    asked = config.quantize.scale_dtype
    return stored_precision(source["dtype"], source["source_precision"]) if asked == "auto" else asked


def _of_profile(
    cell: Cell, config: RunConfig, source: Mapping[str, Any], data: Mapping[str, str]
) -> dict[str, Any]:
    assert config.profile is not None
    settings = config.profile.model_dump(mode="json", exclude={"text": _NOT_THE_TEXT})
    return {"profile": settings, "data": {"profile": data["profile"]}}


def _of_evaluation(
    cell: Cell, config: RunConfig, source: Mapping[str, Any], data: Mapping[str, str]
) -> dict[str, Any]:
    assert config.evaluation is not None
    tasks = {task: getattr(config.evaluation, task) for task in config.evaluation.tasks}
    scheme = Scheme.parse(cell.scheme)
    return made_of_weights(scheme, config, data) | {
        "scheme": cell.scheme,
        "quantize": {
            "skip": sorted(config.quantize.skip),
            "scale_dtype": _scale_dtype(config, source),
        },
        "kernel": config.quantize.kernel,
        "evaluation": {
            task: settings.model_dump(mode="json", exclude=_NOT_THE_TEXT) for task, settings in tasks.items()
        },
        "bos": config.evaluation.bos,
        "data": {task: data[task] for task in tasks},
    }

"""One frozen model per section of a run's YAML; defaults live here and nowhere else.

A run file is one `RunConfig`. Unknown keys are errors that name the nearest known key. `--set section.key=value`
and the command line's options are merged into the same mapping before it is validated, so that there is one way in.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from probes.catalogue import STATISTICS
from quantlab.errors import nearest
from quantlab.methods.config import MethodConfig
from quantlab.schemes import Scheme, width_name
from quantlab.sections import Section, build_section, read_yaml
from quantlab.transforms.config import TransformConfig


class CheckpointConfig(Section):
    """A checkpoint and how it is loaded."""

    path: str
    """Folder or hub id in Hugging Face format, a `.gguf` file, or `package://NAME/FILE` for a folder or file that an
    installed Python package carries."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; `auto` is float32 on a CPU and bfloat16 on CUDA."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`cpu`, `cuda`, `cuda:N`, or `auto`: CUDA where there is one."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Off unless you trust its author."""
    schemes: tuple[str, ...] | None = None
    """Schemes of this checkpoint; none means the run's. The 16-bit baseline is always scored."""
    limit: int | None = Field(None, ge=1)
    """HellaSwag documents of this checkpoint; none means the run's `evaluation.hellaswag.limit`."""
    num_sequences: int | None = Field(None, ge=1)
    """Blocks of perplexity's text for this checkpoint; none means the run's `evaluation.perplexity.num_sequences`."""

    @field_validator("schemes")
    @classmethod
    def _canonical(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if values is None else _scheme_names(values)


class TextConfig(Section):
    """A text, tokenized whole without special tokens and cut into consecutive blocks."""

    path: str | None = None
    """UTF-8 text file, or `package://NAME/FILE` for one that an installed Python package carries; none means the
    WikiText-2 raw test split that ships with quantlab."""
    format: Literal["auto", "rows", "file"] = "auto"
    """`rows`: every line is a row, a blank line an empty one, joined by two newlines, as most papers read WikiText-2;
    `file`: the file as it is, as llama.cpp reads it; `auto`: rows for the WikiText-2 that ships, else the file."""
    sequence_length: int = Field(512, ge=2)
    """Tokens in a block."""
    num_sequences: int | None = Field(16, ge=1)
    """Blocks used; none means all of them."""
    sampling: Literal["first", "draw"] = "draw"
    """A seeded draw among all blocks of the text, or its first blocks, which are of a handful of documents."""
    seed: int = Field(0, ge=0)
    """Seed of the draw."""

    @field_validator("path", mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value


class CalibrationText(TextConfig):
    """The text of a calibration: not one that models are scored on."""

    path: str | None = "package://quantlab/checkpoints/pair/held_out.txt"
    """UTF-8 text file, or `package://NAME/FILE` for one that an installed Python package carries; null means the
    WikiText-2 raw test split that ships with quantlab, which perplexity is measured on."""
    num_sequences: int | None = Field(128, ge=1)
    """Blocks used; none means all of them."""


class CalibrationConfig(Section):
    """Statistics of activations, collected once and shared by every method."""

    text: CalibrationText = CalibrationText()
    """The text that is read."""
    accumulate: Literal["float32", "float64"] = "float32"
    """Dtype in which products of activations are summed."""
    batch_size: int = Field(8, ge=1)
    """Sequences in a forward pass of a layer; changes speed and memory, and results by rounding only."""
    stream: bool | None = None
    """Read weights a layer at a time instead of holding the model in memory; none means where it takes more than half
    of the memory that is free."""
    cache: Path | None = None
    """Folder of stored calibrations; none means `runs/calibration`."""


class ProfileConfig(Section):
    """Outlier statistics of one pass over a text."""

    text: TextConfig = TextConfig()
    """The text that is read."""
    top_k: int = Field(100, ge=100, le=1000)
    """Largest magnitudes that are kept with their place."""
    statistics: tuple[str, ...] = tuple(STATISTICS)
    """Statistics of the record, names of `quantlab list statistics`."""

    @field_validator("statistics")
    @classmethod
    def _known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if value not in STATISTICS:
                raise ValueError(f"unknown statistic {value!r}.{nearest(value, STATISTICS)}")
        return values


class HellaSwagConfig(Section):
    """The HellaSwag documents that are scored, zero-shot."""

    path: Path | None = None
    """A `.jsonl`, `.jsonl.xz` or `.parquet` file with HellaSwag's fields; none means the validation split that ships
    with quantlab (10,042 documents)."""
    limit: int | None = Field(None, ge=1)
    """The first N documents of one fixed permutation of the file, drawn with `seed`."""
    items: str | None = Field(None, pattern=r"^\d*:\d*$")
    """`A:B`, documents by their position in the file, B excluded; excludes `limit`."""
    seed: int = Field(0, ge=0)
    """Seed of the permutation that `limit` cuts."""

    @model_validator(mode="after")
    def _one_selection(self) -> Self:
        if self.limit is not None and self.items is not None:
            raise ValueError("give limit or items, not both")
        return self


class EvaluationConfig(Section):
    """What is scored."""

    tasks: tuple[Literal["hellaswag", "perplexity"], ...] = Field(("hellaswag", "perplexity"), min_length=1)
    """Tasks, each scored once per checkpoint and scheme."""
    hellaswag: HellaSwagConfig = HellaSwagConfig()
    """HellaSwag's documents."""
    perplexity: TextConfig = TextConfig()
    """Perplexity's text."""
    batch_size: int | Literal["auto"] = "auto"
    """Documents (or blocks) in one forward pass; changes speed and memory, never a score. Schemes that round
    activations or attention maps take one at a time whatever is asked."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Beginning-of-sequence token before each HellaSwag context: as the tokenizer does by itself, or forced."""

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(values)))

    def sized(self, limit: int | None, num_sequences: int | None) -> Self:
        """The same with another number of documents or blocks of text, where one is given."""
        documents = {} if limit is None else {"limit": limit}
        blocks = {} if num_sequences is None else {"num_sequences": num_sequences}
        return self.model_copy(
            update={
                "hellaswag": self.hellaswag.model_copy(update=documents),
                "perplexity": self.perplexity.model_copy(update=blocks),
            }
        )

    @field_validator("batch_size")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("batch_size must be at least 1 or 'auto'")
        return value


class CompareConfig(Section):
    """Which checkpoints the report pairs: matched ones, of one text, one order and one parameter budget.

    Other checkpoints of the run are references, shown and never paired.
    """

    baseline: str
    """Path of the checkpoint that the others are compared with, as `checkpoints` writes it."""
    against: tuple[str, ...] = Field(min_length=1)
    """Paths of the checkpoints that are compared with it."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len({self.baseline, *self.against}) <= len(self.against):
            raise ValueError("a comparison must name different checkpoints")
        return self


class QuantizeConfig(Section):
    """How schemes are applied."""

    skip: tuple[str, ...] = ()
    """Dotted patterns of linears that stay at 16 bits, besides lm_head and embeddings."""
    kernel: Literal["integer", "simulated", "packed"] = "integer"
    """Weight-activation schemes at 8 bits and below: real integer products, or the float reference. `packed`: weights
    stay packed in memory and inputs are bfloat16, on a CPU; what it cannot take is refused."""
    widths: dict[str, str] = Field(default_factory=dict)
    """Of schemes that end in `mixed`: dotted pattern of linears -> their weights (`w8`, `w3g64`, `w16`), instead of
    the scheme's own; where several match, the last."""
    scale_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype that scales of weights are rounded to before codes are chosen, as they will be stored; `auto`: that of the
    checkpoint where it has 16 bits, else that of the loaded weights. A format that fixes another has it its own way."""
    methods: MethodConfig = MethodConfig()
    """Settings of the weight methods."""
    transforms: TransformConfig = TransformConfig()
    """Settings of the transforms."""

    @field_validator("widths")
    @classmethod
    def _weights_only(cls, values: dict[str, str]) -> dict[str, str]:
        return {pattern: width_name(value) for pattern, value in values.items()}


class ExportConfig(Section):
    """Low-bit weights written at the end of a run."""

    scheme: str
    """Scheme whose weights are written."""
    checkpoint: str | None = None
    """Path of the checkpoint, as `checkpoints` writes it; none means the first."""
    format: str = "compressed-tensors"
    """A name of `quantlab list formats`."""
    out: Path | None = None
    """Folder to write; none means `export/SCHEME-FORMAT` in the run's folder, which each run replaces."""
    overwrite: bool = False
    """Replace the folder `out` if it exists, once the new one is complete."""
    records: tuple[Path, ...] | None = None
    """Folders of runs whose matching scores go on the model card; none means this run's and every one under `runs/`."""
    max_shard_size: int = Field(5_000_000_000, ge=1)
    """Bytes of a weight file at most, unless one tensor is larger."""

    @field_validator("scheme")
    @classmethod
    def _canonical(cls, value: str) -> str:
        return Scheme.parse(value).name


class SweepConfig(Section):
    """How the cells of a sweep are executed; changes speed, never a score."""

    workers: int = Field(1, ge=1)
    """Processes, each with a model of its own."""
    threads: int = Field(1, ge=1)
    """Threads of each worker."""


class RunConfig(Section):
    """One complete run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    out: Path | None = None
    """Folder of the run's records and report; none means `runs/NAME`."""
    checkpoints: tuple[CheckpointConfig, ...] = Field(min_length=1)
    """Checkpoints that are profiled and scored."""
    compare: CompareConfig | None = None
    """Matched checkpoints that the report pairs; none pairs nothing."""
    schemes: tuple[str, ...] = ("w16",)
    """Scheme names; the 16-bit baseline is always scored."""
    profile: ProfileConfig | None = ProfileConfig()
    """Outlier profile of every checkpoint; null leaves it out."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Statistics of activations for the methods that need them."""
    evaluation: EvaluationConfig | None = EvaluationConfig()
    """Scores of every checkpoint and scheme; null leaves them out."""
    quantize: QuantizeConfig = QuantizeConfig()
    """How schemes are applied."""
    export: ExportConfig | None = None
    """Weights to write at the end; null writes none."""
    sweep: SweepConfig = SweepConfig()
    """Workers."""

    @field_validator("schemes")
    @classmethod
    def _canonical(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return _scheme_names(values)

    @field_validator("compare")
    @classmethod
    def _compares_its_own(cls, value: CompareConfig | None, info: ValidationInfo) -> CompareConfig | None:
        for path in (value.baseline, *value.against) if value else ():
            _check_named(path, info)
        return value

    @field_validator("evaluation")
    @classmethod
    def _one_selection(cls, value: EvaluationConfig | None, info: ValidationInfo) -> EvaluationConfig | None:
        if value and value.hellaswag.items and any(each.limit for each in info.data.get("checkpoints", ())):
            raise ValueError("give a checkpoint's limit or hellaswag.items, not both")
        return value

    @field_validator("export")
    @classmethod
    def _exports_its_own(cls, value: ExportConfig | None, info: ValidationInfo) -> ExportConfig | None:
        if value and value.checkpoint is not None:
            _check_named(value.checkpoint, info)
        return value

    @property
    def folder(self) -> Path:
        """Where the run's records and report go."""
        return self.out or Path("runs") / self.name

    @property
    def exported(self) -> int:
        """Position of the checkpoint whose weights are written."""
        paths = [checkpoint.path for checkpoint in self.checkpoints]
        return paths.index(self.export.checkpoint) if self.export and self.export.checkpoint else 0

    def of(self, position: int) -> Self:
        """The run as it is for the checkpoint at this position: with the schemes and sizes that are its own."""
        own = self.checkpoints[position]
        changed: dict[str, Any] = {} if own.schemes is None else {"schemes": own.schemes}
        if self.evaluation is not None:
            changed["evaluation"] = self.evaluation.sized(own.limit, own.num_sequences)
        return self.model_copy(update=changed)

    def recorded(self) -> dict[str, Any]:
        """The configuration as records hold it: without where results go, who computes them and how many at a time."""
        elsewhere: dict[str, Any] = {"name": True, "out": True, "sweep": True, "export": True}
        how = {"evaluation": {"batch_size"}, "calibration": {"batch_size", "stream", "cache"}}
        return self.model_dump(mode="json", exclude=elsewhere | how)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run described by a YAML file, with `section.key=value` overrides applied.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the nearest known one is named), a value out of range.
    """
    return build_config(read_yaml(path), overrides, where=str(path))


def build_config(tree: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "options") -> RunConfig:
    """Validate a mapping as a `RunConfig` after merging `section.key=value` overrides into it."""
    return build_section(RunConfig, tree, overrides, where)


def run_name(path: str) -> str:
    """A run's name from a checkpoint's path: the letters, digits and ._- of its last part."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).strip("-._") or "run"


def _scheme_names(values: Sequence[str]) -> tuple[str, ...]:
    """Canonical names, each once, the 16-bit baseline first."""
    return tuple(dict.fromkeys(["w16", *(Scheme.parse(value).name for value in values)]))


def _check_named(path: str, info: ValidationInfo) -> None:
    """Refuse a path that is not one of the run's checkpoints."""
    paths = [checkpoint.path for checkpoint in info.data.get("checkpoints", ())]
    if paths and path not in paths:
        hint = nearest(path, paths) or f" There are {', '.join(paths)}."
        raise ValueError(f"a checkpoint must be named as under 'checkpoints': {path!r} is not there.{hint}")
    if paths.count(path) > 1:
        raise ValueError(
            f"a checkpoint that is named must stand once under 'checkpoints': {path!r} stands twice"
        )

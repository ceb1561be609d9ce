"""One frozen model per section of a training's YAML; defaults live here and nowhere else.

A training file is one `TrainConfig`. It is read like a run's file: unknown keys are errors that name the nearest known
key, and `--set section.key=value` is merged before validation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from quantlab.sections import Section, build_section, read_yaml

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class SourceConfig(Section):
    """A text file and how its documents are told apart."""

    name: str = Field(pattern=_NAME)
    """Name of the source in `corpus.json`."""
    file: Path
    """A `.txt`, `.txt.xz` or `.txt.zst` file, UTF-8, below `corpus.folder`."""
    documents: Literal["separator", "line", "file"] = "separator"
    """A document is what stands between separators, or one line, or the whole file."""
    separator: str = Field("<|endoftext|>", min_length=1)
    """What stands between documents when `documents` is `separator`."""
    max_tokens: int | None = Field(None, ge=1)
    """Training tokens at most: whole documents in a seeded order until the next would exceed it; none takes all."""
    family_characters: int | None = Field(None, ge=1)
    """Documents that agree in their first N characters stay on one side of the split (HellaSwag has several rows of one
    video); none: only equal documents do."""
    licence: str
    """The licence of the text."""
    url: str | None = None
    """Where the text comes from."""


class CorpusConfig(Section):
    """Text sources and how they become token files."""

    folder: Path
    """Folder of the sources."""
    out: Path
    """Folder of the token files, the tokenizer and `corpus.json`; made where it does not exist."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """The texts."""
    vocab_size: int = Field(8192, ge=257)
    """Entries of the byte-level BPE tokenizer, `<|endoftext|>` included."""
    tokenizer_characters: int = Field(10_000_000, ge=1)
    """Characters of each source's training documents that the tokenizer is trained on, at most (one document more)."""
    held_out_fraction: float = Field(0.02, gt=0, lt=1)
    """Share of each source's documents that is never trained on."""
    held_out_tokens: int = Field(100_000, ge=1)
    """Held-out tokens of each source that are kept for evaluation, at most; the last document is cut."""
    seed: int = Field(0, ge=0)
    """Seed of the split and of the draws."""

    @field_validator("sources")
    @classmethod
    def _named_once(cls, values: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = [source.name for source in values]
        if len(set(names)) < len(names):
            raise ValueError(f"every source needs a name of its own: {', '.join(names)}")
        return values

    def recorded(self) -> dict[str, Any]:
        """What decides the corpus: everything but the places."""
        return self.model_dump(mode="json", exclude={"folder": True, "out": True})


class ModelConfig(Section):
    """The baseline, a Llama; every variant is matched to its parameter count."""

    hidden_size: int = Field(ge=2)
    """Channels of the residual stream."""
    num_hidden_layers: int = Field(ge=1)
    """Decoder layers."""
    num_attention_heads: int = Field(ge=1)
    """Attention heads of the baseline."""
    num_key_value_heads: int | None = Field(None, ge=1)
    """Key-value heads of the baseline; none means one for each attention head."""
    intermediate_size: int = Field(ge=1)
    """Channels inside the baseline's feed-forward layers; variants have another number, so that parameters match."""
    max_position_embeddings: int = Field(1024, ge=2)
    """Positions that the saved model allows; at least `schedule.sequence_length`."""
    tie_word_embeddings: bool = True
    """The output layer is the embedding."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    rms_norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square in every norm."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""


class VariantConfig(Section):
    """An attention variant to train."""

    variant: str
    """A name of the VARIANTS table."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the variant; what is not given keeps the variant's default."""
    name: str | None = Field(None, pattern=_NAME)
    """Name of the output folder; none means the variant's name."""

    @property
    def title(self) -> str:
        """Name of the output folder, without the seed."""
        return self.name or self.variant


class ScheduleConfig(Section):
    """Which tokens are seen, in which portions, at which learning rate."""

    tokens: int = Field(ge=1)
    """Tokens that are trained on, rounded down to whole steps; beyond the corpus's they make several epochs."""
    sequence_length: int = Field(ge=2)
    """Tokens in a block."""
    batch_size: int = Field(ge=1)
    """Blocks in one step."""
    warmup_steps: int = Field(100, ge=0)
    """Steps in which the learning rate rises linearly from 0."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Shape of the fall after warmup."""
    floor: float = Field(0.1, ge=0, le=1)
    """Share of the learning rate that is left at the last step."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // (self.sequence_length * self.batch_size)

    @model_validator(mode="after")
    def _one_step(self) -> Self:
        if self.steps < 1:
            raise ValueError(
                f"tokens must make at least one step of {self.sequence_length * self.batch_size}"
            )
        return self


class OptimizerConfig(Section):
    """AdamW."""

    learning_rate: float = Field(2e-3, gt=0)
    """Learning rate after warmup."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.1, ge=0)
    """Decay of matrices; embeddings, norms, biases and lambda vectors have none."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient's norm is clipped to this."""


class ProcessConfig(Section):
    """How the trainings are executed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is one."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast over weights that are kept in float32."""
    weights_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the saved weights."""
    log_every: int = Field(10, ge=1)
    """Steps between points of the training loss; each is the mean over them."""
    evaluate_every: int = Field(200, ge=1)
    """Steps between held-out losses, a multiple of `log_every`."""
    evaluation_blocks: int = Field(64, ge=1)
    """Held-out blocks scored during training, a seeded draw; the end scores all of them."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints, a multiple of `log_every`; the last two are kept."""
    max_seconds: float | None = Field(None, gt=0)
    """Checkpoint and stop after so many seconds; the same command goes on from there."""
    workers: int = Field(1, ge=1)
    """Trainings at a time, each in a process of its own."""
    threads: int = Field(1, ge=1)
    """Threads of each training on the CPU."""

    @model_validator(mode="after")
    def _multiples(self) -> Self:
        for name in ("evaluate_every", "checkpoint_every"):
            # A mean over steps of which some were taken before an interruption would lack those.
            if getattr(self, name) % self.log_every:
                raise ValueError(f"{name} must be a multiple of log_every ({self.log_every})")
        return self

    def recorded(self) -> dict[str, Any]:
        """What decides the result: not when it stops, nor how many run at a time."""
        return self.model_dump(
            mode="json", exclude={"max_seconds": True, "workers": True, "threads": True, "device": True}
        )


class TrainConfig(Section):
    """Every variant x seed, trained alike."""

    name: str = Field("train", pattern=_NAME)
    """Name of the training."""
    out: Path | None = None
    """Folder of the trained models; none means `runs/NAME`."""
    corpus: CorpusConfig
    """The text."""
    model: ModelConfig
    """The baseline."""
    variants: tuple[VariantConfig, ...] = Field(min_length=1)
    """What is trained, as names or with options."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Each decides initial weights and the order of the blocks, the same for every variant."""
    schedule: ScheduleConfig
    """Tokens and learning rate."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    process: ProcessConfig = ProcessConfig()
    """Device, precision, checkpoints."""

    @field_validator("variants", mode="before")
    @classmethod
    def _by_name(cls, values: Any) -> Any:
        if not isinstance(values, list | tuple):
            return values
        return [{"variant": value} if isinstance(value, str) else value for value in values]

    @field_validator("seeds")
    @classmethod
    def _seeds_once(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(values)) < len(values) or min(values) < 0:
            raise ValueError("seeds must differ and be at least 0")
        return values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        titles = [variant.title for variant in self.variants]
        if len(set(titles)) < len(titles):
            raise ValueError(f"every variant needs a name of its own: {', '.join(titles)}")
        positions = self.model.max_position_embeddings
        if self.schedule.sequence_length > positions:
            raise ValueError(
                f"sequence_length {self.schedule.sequence_length} must be at most max_position_embeddings {positions}"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where the trained models go."""
        return self.out or Path("runs") / self.name


def load_train_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The training described by a YAML file, with `section.key=value` overrides applied; errors as `load_config`."""
    return build_section(TrainConfig, read_yaml(path), overrides, where=str(path))

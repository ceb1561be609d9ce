"""A checkpoint in memory: model, tokenizer and what they are, ready to be evaluated and nothing else.

The model is in eval mode, needs no gradient, and holds exactly the checkpoint's weights: a tensor that is missing, of
another shape, unknown to the model, or not finite is an error, since transformers would fill it with random numbers
or drop it with a warning.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from quantlab.config import CheckpointConfig
from quantlab.errors import CheckpointError, ConfigError, UserError
from quantlab.inspection.checkpoint import CheckpointInfo, contents_of, inspect_checkpoint
from quantlab.inspection.contents import Identity, identities
from quantlab.inspection.families import Family, family_of
from quantlab.inspection.gguf_header import read_gguf
from quantlab.inspection.gguf_names import config_of
from quantlab.models.gguf_tokenizer import cut_as_named_
from quantlab.models.gguf_weights import read_weights
from quantlab.models.stored import note_source_
from quantlab.schemes import Scheme

__all__ = ["Checkpoint", "load_checkpoint", "resolve_device", "resolve_dtype"]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: CheckpointInfo
    family: Family
    scheme: Scheme | None = None
    """What the model carries already, where it comes from a folder of low-bit weights."""
    files: Mapping[Path, Identity] | None = None
    """Identities of its files when they were loaded, where that is known."""

    def content_hash(self) -> str:
        """SHA-256 of what was loaded.

        Raises:
            CheckpointError: a file was written since.
        """
        contents = contents_of(self.info)
        if self.files is not None:
            contents.check_loaded(self.files)
        return contents.sha256


def load_checkpoint(config: CheckpointConfig, info: CheckpointInfo | None = None) -> Checkpoint:
    """Load model and tokenizer.

    Args:
        config: the checkpoint, and the dtype and device it is loaded to.
        info: what `inspect_checkpoint` said of it; inspected here where it is not given.

    Raises:
        CheckpointError: damaged, not finite, or not what its architecture asks for.
        ConfigError: a device that this machine does not have.
    """
    device = resolve_device(config.device)
    info = info or inspect_checkpoint(config)
    files = identities(info.path, info.files)
    loaded = _load(config, info, device)
    check_untouched(files, info)
    return replace(loaded, files=files)


def check_untouched(files: Mapping[Path, Identity], info: CheckpointInfo) -> None:
    """Refuse files that were written while they were loaded.

    Args:
        files: their identities before.

    Raises:
        CheckpointError: one was.
    """
    now = identities(info.path, info.files)
    for file in sorted(files.keys() | now.keys()):
        if files.get(file) != now.get(file):
            raise CheckpointError(
                f"a checkpoint must stay as it is while it is loaded: {file} was written meanwhile. Run again once "
                "nothing writes there."
            )


def _load(config: CheckpointConfig, info: CheckpointInfo, device: torch.device) -> Checkpoint:
    if info.carries is not None:
        from quantlab.models.low_bit import load_low_bit

        return load_low_bit(info.path, dtype=config.dtype, device=config.device, info=info)
    with quiet(), one_sentence(info.path):
        load = _load_gguf if info.kind == "gguf" else _load_folder
        model, report = load(info, resolve_dtype(config.dtype, device), config.trust_remote_code)
        check_complete(report, info.path)
        _check_tied(model, info)
        tokenizer = load_tokenizer(info, config.trust_remote_code)
        model = model.to(device).eval().requires_grad_(False)
        note_source_(model, info.source_precision)
        check_finite(model, info.path)
        info = with_rows(info, model)
    return Checkpoint(model, tokenizer, info, family_of(info.model_type, info.variant))


def with_rows(info: CheckpointInfo, model: PreTrainedModel) -> CheckpointInfo:
    """The same with the rows that the model's input embedding has."""
    rows = model.get_input_embeddings().weight.shape[0]
    return info if rows == info.vocab_size else replace(info, vocab_size=rows)


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means on this machine."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} must exist: this machine has {torch.cuda.device_count()} CUDA devices. Use --device cpu."
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `auto` or a name means: float32 on a CPU, bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _load_folder(
    info: CheckpointInfo, dtype: torch.dtype, trusted: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    config = AutoConfig.from_pretrained(info.path, trust_remote_code=trusted)
    if getattr(config, "quantization_config", None):
        # To plain linears at once, which any scheme can be applied to, not by a hook of the first forward pass.
        config.quantization_config = {**config.quantization_config, "dequantize": True}
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    model, report = AutoModelForCausalLM.from_pretrained(
        info.path,
        config=config,
        dtype=dtype,
        attn_implementation=attention_of(model_class),
        trust_remote_code=trusted,
        use_safetensors=True,
        local_files_only=True,
        # Reported instead of raised, so that one error names what does not fit.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return model, report


def _check_tied(model: PreTrainedModel, info: CheckpointInfo) -> None:
    """What the config ties is one tensor: transformers unties it without a word where two are stored that differ."""
    head = model.get_output_embeddings()
    if not model.config.tie_word_embeddings or head is None:
        return
    if head.weight is not model.get_input_embeddings().weight:
        raise CheckpointError(
            f"tied embeddings must be stored once, or twice and equal: {info.path} holds an output embedding of its "
            f"own, and tie_word_embeddings of its config.json is true. Set that to false if both are meant."
        )


def attention_of(model_class: Any) -> str:
    """The attention that a class is loaded with: named, since a config.json may name one to fetch and run."""
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def _load_gguf(
    info: CheckpointInfo, dtype: torch.dtype, trusted: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    header = read_gguf(info.path)
    values = config_of(header, info.path)
    config = AutoConfig.for_model(**values)
    model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=read_weights(info.path, header, dtype),
        dtype=dtype,
        attn_implementation="sdpa",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model.generation_config = GenerationConfig.from_model_config(config)
    return model, report


def load_tokenizer(info: CheckpointInfo, trusted: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, which has encoded a text: what its parts hold is looked at by the first alone."""
    with _without_panics():
        tokenizer = _tokenizer_of(info, trusted)
        tokenizer("A text.", verbose=False)
    return tokenizer


def _tokenizer_of(info: CheckpointInfo, trusted: bool) -> PreTrainedTokenizerBase:
    if info.kind == "gguf":
        # Built directly: from_pretrained would prefer any tokenizer.json that lies beside the file.
        tokenizer = PreTrainedTokenizerFast(name_or_path=str(info.path.parent), gguf_file=info.path.name)
        keys = read_gguf(info.path).metadata
        if keys.get("tokenizer.ggml.model") == "gpt2":
            cut_as_named_(tokenizer, keys.get("tokenizer.ggml.pre"))
    else:
        tokenizer = AutoTokenizer.from_pretrained(info.path, trust_remote_code=trusted, local_files_only=True)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def check_complete(report: Mapping[str, Any], path: Path) -> None:
    """Every weight of the model came from the checkpoint, and every tensor of the checkpoint went into it."""
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise CheckpointError(
            f"tensors must agree with the config: {path} holds {name!r} of shape {list(found)}, the model asks for "
            f"{list(expected)}{_more(mismatched)}."
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"checkpoint lacks weights of its model: {path} has no {missing[0]!r}{_more(missing)}."
        )
    if unexpected := sorted(report["unexpected_keys"]):
        raise CheckpointError(
            f"checkpoint holds weights that its model has no place for: {path} has {unexpected[0]!r}"
            f"{_more(unexpected)}. config.json may be another model's."
        )


def _more(found: list[Any]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def check_finite(model: PreTrainedModel, path: Path) -> None:
    """Every parameter and buffer is free of NaN and Inf, in the dtype it was loaded to."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # The extremes carry NaN along, in one pass and without a mask of the tensor's size.
        if torch.isfinite(torch.stack(tensor.aminmax())).all():
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"weights must be finite: {path} holds {bad} NaN or Inf among the {tensor.numel()} values of {name!r}, "
            f"loaded as {str(tensor.dtype).removeprefix('torch.')}."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and reports, which `check_complete` turns into errors."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _without_panics() -> Iterator[None]:
    """A panic of the tokenizers library, which is no Exception and prints a stack, as an Exception that prints none."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            printed.truncate(0)
            raise ValueError(str(error)) from error
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            printed.seek(0)
            sys.stderr.write(printed.read().decode(errors="replace"))


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """Whatever transformers raises about a checkpoint that passed inspection, as one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise CheckpointError(
            f"checkpoint cannot be loaded: {path}: {type(error).__name__}: {reason[:300].rstrip('.')}."
        ) from error

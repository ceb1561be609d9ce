"""The end of a training: the held-out loss of the weights as they are saved, the folder, and its record.

`training.json` records how the model was made; what differs from run to run of the same settings (time, host, library
versions) is under `environment`.
"""

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from quantlab.export.atomic import new_folder
from quantlab.machine import cpu_line
from quantlab.records import plain, source_hash
from quantlab.train.blocks import held_out_blocks
from quantlab.train.config import TrainConfig
from quantlab.train.corpus import Corpus
from quantlab.train.models import count_parameters
from quantlab.train.plan import RECORD, Job

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "quantlab")


def finish(trainer: Any, config: TrainConfig, job: Job, corpus: Corpus, seconds: float) -> None:
    """Score the whole held-out split, write the job's folder, and remove its checkpoints.

    Args:
        seconds: spent on training, evaluation during it and checkpoints included.
    """
    model, curve = trainer.model, loss_curve(trainer.state.log_history, config)
    dtype = getattr(torch, config.process.weights_dtype)
    round_weights_(model, dtype)
    blocks = held_out_blocks(corpus.tokens("held_out"), config.schedule.sequence_length)
    loss = float(trainer.evaluate(eval_dataset=blocks)["eval_loss"])
    record = training_record(model, config, job, corpus, seconds)
    record["held_out"] = {"nats_per_token": loss, "blocks": len(blocks), "tokens": len(blocks) * blocks.T}
    model.config.use_cache = model.config.options.has_cache  # the Trainer turns it off
    with new_folder(job.folder) as folder:
        model.to(device="cpu", dtype=dtype).save_pretrained(folder)
        for name in _TOKENIZER_FILES:
            if (corpus.folder / name).exists():
                shutil.copyfile(corpus.folder / name, folder / name)
        text = json.dumps(plain(record | {"curve": curve}), indent=2, ensure_ascii=False) + "\n"
        (folder / RECORD).write_text(text, encoding="utf-8")
    shutil.rmtree(job.work, ignore_errors=True)


def round_weights_(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every weight to what `dtype` can hold, so that the loss is that of the saved weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def loss_curve(history: list[dict[str, Any]], config: TrainConfig) -> dict[str, list[dict[str, Any]]]:
    """Training and held-out loss, nats per token, with step and tokens; a training loss is the mean since the last."""
    per_step = config.schedule.sequence_length * config.schedule.batch_size
    curve: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
    for entry in history:
        place = {"step": entry["step"], "tokens": entry["step"] * per_step}
        if "loss" in entry:
            names = ("loss", "grad_norm", "learning_rate")
            curve["train"].append(place | {name: entry[name] for name in names})
        elif "eval_loss" in entry:
            curve["held_out"].append(place | {"loss": entry["eval_loss"]})
    return curve


def training_record(
    model: nn.Module, config: TrainConfig, job: Job, corpus: Corpus, seconds: float
) -> dict[str, Any]:
    """How the model was made."""
    schedule = config.schedule
    tokens = schedule.steps * schedule.batch_size * schedule.sequence_length
    blocks = len(corpus.tokens("train")) // schedule.sequence_length
    return {
        "title": job.title,
        "variant": job.variant.variant,
        "seed": job.seed,
        "settings": job.settings,
        "parameters": count_parameters(model),
        "steps": schedule.steps,
        "tokens": tokens,
        "epochs": schedule.steps * schedule.batch_size / blocks,
        "corpus": {name: corpus.facts[name] for name in ("tokens", "sha256", "sources", "vocab_size")},
        "environment": _environment(job, seconds),
    }


def _environment(job: Job, seconds: float) -> dict[str, Any]:
    device = job.settings["process"]["device"]
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_line()
    return {
        "seconds": round(seconds, 1),
        "device": name,
        "threads": torch.get_num_threads(),
        "code": source_hash(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"

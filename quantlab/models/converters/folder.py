"""A checkpoint's folder in another implementation's layout: weights, config and tokenizer; whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from quantlab.export.atomic import new_folder
from quantlab.export.shards import DEFAULT_SHARD_SIZE, Part, TensorType, write_shards
from quantlab.inspection.checkpoint import CheckpointInfo
from quantlab.inspection.conversions import check_conversion
from quantlab.models.converters.checks import readable
from quantlab.models.converters.diffllama import from_diffllama, to_diffllama
from quantlab.models.converters.llama import from_llama, to_llama

KEPT = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "generation_config.json",
    "LICENSE*",
)
"""Files that are copied as they are."""
Convert = Callable[..., tuple[dict[str, Tensor], PreTrainedConfig]]


CONVERTERS: dict[tuple[str, str], Convert] = {
    ("quantlab", "llama"): to_llama,
    ("quantlab", "diffllama"): to_diffllama,
    ("llama", "quantlab"): from_llama,
    ("diffllama", "quantlab"): from_diffllama,
}
"""(model_type of the source, of the result) -> the function; the pairs are those of `inspection.conversions`."""


def convert_folder(
    source: str,
    to: str,
    out_dir: Path,
    *,
    fold_gain: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """Write a checkpoint as another model_type; tensors keep their dtype, tokenizer and generation config their bytes.

    Args:
        source: folder or hub id.
        to: a name of `inspection.conversions.CONVERSIONS`.
        fold_gain: see `to_diffllama`.
        overwrite: replace an earlier export, once the new one is complete.

    Returns:
        path, model_type before and after, number of tensors and bytes of weights: JSON-ready.

    Raises:
        ConfigError: no such target, or one that the source cannot become.
        CheckpointError: the source is missing, damaged, quantized, or not what its config describes.
        OutputError: the folder exists, overlaps the source or cannot be written; what was there is untouched.
    """
    info = check_conversion(source, to, out_dir, fold_gain=fold_gain, overwrite=overwrite, revision=revision)
    options: dict[str, Any] = {"fold_gain": True} if fold_gain else {}
    convert = CONVERTERS[info.model_type, to]
    with readable("read a configuration"):
        found = AutoConfig.from_pretrained(info.path)
    state, config = convert(_read(info), found, **options)
    with new_folder(out_dir, overwrite=overwrite) as folder:
        size = write_shards(folder, _parts(state), DEFAULT_SHARD_SIZE, lambda count: None)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
        config.save_pretrained(folder)
        for pattern in KEPT if info.path.is_dir() else ():
            for file in info.path.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    return {
        "path": str(out_dir),
        "from": info.model_type,
        "to": config.model_type,
        "tensors": len(state),
        "weights_bytes": size,
    }


def _read(info: CheckpointInfo) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, in its own dtype."""
    return {name: tensor for file in info.files for name, tensor in load_file(file).items()}


def _parts(state: dict[str, Tensor]) -> list[Part]:
    return [_part(name, tensor) for name, tensor in state.items()]


def _part(name: str, tensor: Tensor) -> Part:
    # A copy, since tensors of a shard may not share memory.
    return Part(
        {name: TensorType(tensor.dtype, tuple(tensor.shape))}, lambda: {name: tensor.clone().contiguous()}
    )

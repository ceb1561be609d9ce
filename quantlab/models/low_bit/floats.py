"""What keeps its precision in a folder of low-bit weights: loaded and checked as an ordinary checkpoint."""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel

from quantlab.models.loading import attention_of, check_complete
from quantlab.models.low_bit.carried import Carried
from quantlab.models.stored_names import StoredNames
from quantlab.reading.raw import RawFolder

__all__ = ["with_floats"]


def with_floats(
    config: PreTrainedConfig, skeleton: nn.Module, carried: Carried, dtype: torch.dtype, names: StoredNames
) -> PreTrainedModel:
    """The model with all that keeps its precision; its linears in low bits hold zeros that take no memory."""
    raw, model_class = carried.raw, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    own = carried.own
    kept = {name: _tensor(raw, name) for name in raw.tensors if name not in own}
    added = {
        name: kept.pop(bias)
        for name in _without_bias(skeleton)
        if (bias := f"{names.module(name)}.bias") in kept
    }
    held = skeleton.state_dict().keys()
    for name, owner in carried.linears.items():
        # Where one block serves all layers, it is read under its first name.
        if owner is not None and f"{names.loaded(name)}.weight" in held:
            shape = skeleton.get_parameter(f"{names.loaded(name)}.weight").shape
            kept[f"{name}.weight"] = torch.zeros(1, dtype=dtype).expand(shape)
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=kept,
        dtype=dtype,
        attn_implementation=attention_of(model_class),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    check_complete(report, raw.path)
    for name, extra in added.items():
        # Folding a norm that adds something gives its readers a bias, which the architecture does not have.
        model.get_submodule(name).bias = nn.Parameter(extra.to(dtype))
    model.generation_config = (
        GenerationConfig.from_pretrained(raw.path)
        if (raw.path / "generation_config.json").exists()
        else GenerationConfig.from_model_config(config)
    )
    return model


def _without_bias(skeleton: nn.Module) -> list[str]:
    """Linears that the architecture gives no bias."""
    return [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and "bias" not in dict(module.named_parameters())
    ]


def _tensor(raw: RawFolder, name: str) -> Tensor:
    """A stored tensor in memory of its own."""
    array, dtype = raw.array(name), raw.tensors[name].dtype
    values = torch.from_numpy(np.array(array))
    others = {
        "BF16": torch.bfloat16,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
    }
    return values.view(others[dtype]) if dtype in others else values

"""Toy models whose every gain, bias and learned vector is random, so that a transform that forgets one is seen."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from probes.hooks import watch
from quantlab.attention.variants import VARIANTS
from quantlab.calibration.statistics import LinearStats
from quantlab.inspection.graph import GRAPHS
from quantlab.transforms.guard import Guard, difference, logits_of
from tests.toys import toy_model

VARIANT_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "diff_v1": [{}, {"pairing": "halves"}, {"subln_affine": False}],
    "grouped_diff": [{"ratio": 1}],
    "flow": [{}, {"flow_encoder": True}, {"flow_encoder": True, "potential": "local"}],
    "continuous_depth": [{}, {"conditioned": False}, {"solver": "dopri5"}],
    "dex": [{"heads": "0,3"}],
}
"""Options that change the graph; the others run with their defaults."""
CHANGES: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}],
    "gpt_neox": [{}, {"attention_bias": False}],
    "opt": [{}, {"enable_bias": False}],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        " ".join([family, *(f"{key}={value}" for key, value in changes.items())]): (family, changes)
        for family in GRAPHS
        for changes in CHANGES.get(family, [{}])
    },
    **{
        " ".join([variant, *(f"{key}={value}" for key, value in options.items())]): (
            "quantlab",
            {"variant": variant, "variant_options": options},
        )
        for variant in VARIANTS
        for options in VARIANT_OPTIONS.get(variant, [{}])
    },
    # Several value heads, so that their order matters: the toys of these have one.
    "diffllama 4 keys": ("diffllama", {"num_key_value_heads": 4}),
    "diff_v1 halves, 4 keys": (
        "quantlab",
        {"variant": "diff_v1", "variant_options": {"pairing": "halves"}, "num_key_value_heads": 4},
    ),
    "diff_v1 8 heads": (
        "quantlab",
        {"variant": "diff_v1", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
    ),
    "grouped_diff 8 heads": (
        "quantlab",
        {"variant": "grouped_diff", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
    ),
}
"""Name of a test case -> family and what differs from the toy's configuration."""


def random_model(case: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The toy with random gains between 0.5 and 1.5, and random biases and vectors; matrices make logits of a few."""
    family, changes = CASES[case]
    model = toy_model(family, gain=4.0, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                spread = torch.rand(parameter.shape, generator=generator) - 0.5
                is_gain = "norm" in name or "ln" in name
                parameter.copy_(spread + float(parameter.mean().round()) if is_gain else spread / 2)
    return model.to(dtype)


def tokens(num_sequences: int = 4, length: int = 24, seed: int = 2) -> Tensor:
    """Random token ids [N, T] of the toys' vocabulary."""
    return torch.randint(0, 512, (num_sequences, length), generator=torch.Generator().manual_seed(seed))


def statistics(model: PreTrainedModel, ids_NT: Tensor) -> Mapping[str, LinearStats]:
    """What every linear of the decoder layers reads, gathered in one pass."""
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), watch(model, "*", lambda name, module, args, _: _see(seen, name, module, args)):
        model(ids_NT, use_cache=False)
    return {name: _stats(inputs) for name, inputs in seen.items()}


def _see(seen: dict[str, Tensor], name: str, module: Any, args: tuple[Any, ...]) -> None:
    if (
        getattr(module, "weight", None) is not None
        and module.weight.ndim == 2
        and args[0].is_floating_point()
    ):
        new = args[0].detach().float().flatten(0, -2)
        seen[name] = torch.cat((seen[name], new)) if name in seen else new


def _stats(inputs_NI: Tensor) -> LinearStats:
    low, high = inputs_NI.aminmax(dim=0)
    return LinearStats(inputs_NI.T @ inputs_NI, low, high, inputs_NI.mean(0), len(inputs_NI))


def assert_near_rounding(guard: Guard) -> None:
    """Within the bounds that the docstring of the guard says a test holds."""
    after = logits_of(guard.model, guard.ids_NT)
    found, noise = difference(guard.before_NTV, after), guard.noise(after)
    assert found.typical <= 1.5 * noise and found.worst <= 4 * noise, f"{found}, noise {noise:.3g}"

"""What a GGUF file says of a model besides its weights: its architecture in llama.cpp, and its sizes.

What llama.cpp would compute otherwise than the model (a scaled rotary embedding, another activation) is refused: no key
of a file would tell it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from quantlab.errors import SchemeError
from quantlab.export.gguf_file import Value
from quantlab.inspection.gguf_names import GGUF_ARCHITECTURES

__all__ = ["architecture_name", "note_of", "size_keys"]


def architecture_name(model: PreTrainedModel) -> str:
    """The name of llama.cpp's architecture that computes what this model does.

    Raises:
        SchemeError: it has none.
    """
    model_type = model.config.model_type
    for name, architecture in GGUF_ARCHITECTURES.items():
        if model_type in (architecture.model_type, *architecture.also):
            for what, is_so in _ASSUMED[name].items():
                if not is_so(model.config):
                    raise SchemeError(
                        f"a GGUF file of a {model_type} model must have {what}, which llama.cpp takes for granted: "
                        f"this one has another. Use --format quantlab."
                    )
            return name
    known = sorted(each for a in GGUF_ARCHITECTURES.values() for each in (a.model_type, *a.also))
    raise SchemeError(
        f"format gguf needs an architecture that llama.cpp has and quantlab writes ({', '.join(known)}): found "
        f"{model_type}. Use --format quantlab."
    )


def size_keys(config: PretrainedConfig, name: str, vocab_size: int) -> dict[str, Value]:
    """Keys under the architecture's name, in the order of its table."""
    architecture = GGUF_ARCHITECTURES[name]
    values = {key: _SPECIAL.get(own, _plain(own))(config) for key, own in architecture.sizes.items()}
    values["context_length"] = _context(config)
    values["vocab_size"] = vocab_size
    if "attention.key_length" in values:
        head_dim = values["attention.key_length"]
        values |= {"attention.value_length": head_dim, "rope.dimension_count": head_dim}
    return {f"{name}.{key}": value for key, value in values.items()}


def note_of(config: PretrainedConfig) -> str:
    """What the file says otherwise than the config, in words; empty where it says the same."""
    notes = []
    window, length = _window(config), _length(config)
    if window is not None and window < length:
        notes.append(
            f"attention looks back {window} tokens, which the file cannot say: its context_length is {window}, not "
            f"{length}, and up to there it is the same"
        )
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        notes.append(_BESIDES % "leaves the biases of a Llama out")
    if config.model_type == "gpt2" and config.n_positions != 1024:
        notes.append(_BESIDES % "takes GPT-2 at 1024 positions only")
    if config.model_type == "qwen3" and _head_dim(config) != 128:
        notes.append(_BESIDES % "takes Qwen3 with heads of 128 channels only")
    return "; ".join(notes)


_BESIDES = "transformers' GGUF reader (5.23) %s; llama.cpp and quantlab read the file as it is"

_Read = Callable[[Any], Any]


def _plain(key: str) -> _Read:
    return lambda config: getattr(config, key)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


_SPECIAL: Mapping[str, _Read] = {
    "head_dim": _head_dim,
    "rope_theta": lambda config: float(_rope(config)["rope_theta"]),
    "n_inner": lambda config: config.n_inner or 4 * config.n_embd,
    "num_key_value_heads": lambda config: config.num_key_value_heads or config.num_attention_heads,
}
"""Key of config.json -> how it is told from a config, where the config has none or another by that name."""


def _length(config: Any) -> int:
    return int(config.max_position_embeddings)


def _window(config: Any) -> int | None:
    """Tokens that attention looks back, where some layer looks back fewer than all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window and getattr(config, "use_sliding_window", True) else None


def _context(config: Any) -> int:
    return min(_length(config), _window(config) or _length(config))


def _plain_rope(config: Any) -> bool:
    rope = _rope(config)
    return rope.get("rope_type", "default") == "default" and float(rope.get("partial_rotary_factor", 1)) == 1


_ROTARY: dict[str, Callable[[Any], bool]] = {
    "an unscaled rotary embedding": _plain_rope,
    "the activation silu": lambda config: config.hidden_act in ("silu", "swish"),
}
_ASSUMED: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "llama": _ROTARY,
    "qwen2": _ROTARY,
    "qwen3": _ROTARY | {"no biases in attention": lambda config: not config.attention_bias},
    "gpt2": {
        "the activation gelu_new": lambda config: (
            config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        ),
        "logits scaled by the width of a head": lambda config: (
            config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
        ),
    },
}
"""Architecture -> what its graph in llama.cpp does always."""

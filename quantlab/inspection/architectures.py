"""What a config.json may say: an architecture that is known, sizes that exist, and nothing that runs code. No torch.

`known_architectures` reads transformers' own table from its source, since importing it takes two seconds and torch.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from quantlab.errors import CheckpointError, nearest

SIZES: dict[str, tuple[tuple[str, ...], int]] = {
    "num_hidden_layers": (("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 10_000),
    "hidden_size": (("hidden_size", "n_embd", "d_model"), 1_000_000),
    "num_attention_heads": (("num_attention_heads", "n_head", "num_heads", "n_heads"), 100_000),
    "num_key_value_heads": (("num_key_value_heads", "num_kv_heads"), 100_000),
    "head_dim": (("head_dim",), 100_000),
    "intermediate_size": (("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 10_000_000),
    "vocab_size": (("vocab_size",), 10_000_000),
    "max_position_embeddings": (
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
        1_000_000_000,
    ),
    "num_experts": (("num_experts", "num_local_experts", "n_routed_experts"), 100_000),
}
"""Size -> (its names in config.json, the largest that is believed)."""

OURS = "quantlab"
"""`model_type` of quantlab's own models, which `import quantlab.models` makes known to transformers."""

MAY_BE_ZERO = ("num_experts",)
"""Sizes that a dense model of a family with experts sets to 0."""
MAY_DIFFER = ("intermediate_size",)
"""Sizes that a config may give layer by layer, in a list."""

_REFUSED = {
    "transformers_weights": "names a weight file of its own",
    "fusion_config": "asks for modules to be replaced",
    "distributed_config": "asks for a distributed run",
    "use_kernels": "asks for kernels of the hub",
    "kernel_config": "asks for kernels of the hub",
    "trust_remote_code": "is for the user to say",
    "_target_": "names a function to call",
}
"""Keys that make a reader of config.json read, patch or run something else than the checkpoint, wherever they stand."""
_CODE = ("auto_map", "custom_pipelines")
"""Keys that name Python files to run."""
_IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_PLAIN = re.compile(r"\w{0,40}")
"""An implementation that transformers has itself; any other name is fetched from the hub and run."""
_DTYPE = re.compile(r"(torch\.)?(auto|half|double|float|b?float\d{1,3}\w*|u?int\d{1,2}|bool)")
MAX_LABELS = 100_000
"""transformers names every one of them."""


@cache
def known_architectures() -> frozenset[str]:
    """`model_type` of every causal language model that the installed transformers has; empty when it cannot tell."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    root = Path(spec.submodule_search_locations[0])
    return _keys_of(root / "models/auto/modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


@cache
def known_gguf_architectures() -> frozenset[str]:
    """`general.architecture` of every GGUF file that the installed transformers reads; empty when it cannot tell."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    root = Path(spec.submodule_search_locations[0])
    return _keys_of(root / "integrations/ggml.py", "GGUF_CONFIG_MAPPING") - {"general", "tokenizer"}


def _keys_of(source: Path, table: str) -> frozenset[str]:
    """Keys of a module-level `table = {...}` or `table = OrderedDict([(key, ...), ...])`, without importing it."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return frozenset()
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == table:
            keys = [
                key for dictionary in ast.walk(node.value) for key in _first_level(dictionary, node.value)
            ]
            return frozenset(str(key.value) for key in keys if isinstance(key, ast.Constant))
    return frozenset()


def _first_level(node: ast.AST, value: ast.expr) -> list[ast.expr]:
    if isinstance(value, ast.Dict):
        return [key for key in value.keys if key] if node is value else []
    return [node.elts[0]] if isinstance(node, ast.Tuple) and node.elts else []


def check_config(config: Mapping[str, Any], path: Path, *, trust_remote_code: bool) -> str:
    """The `model_type` of a config.json that can be loaded.

    Raises:
        CheckpointError: no or an unknown model_type, code of its own, or sizes that cannot be.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"config.json must name its model_type: {path} does not.")
    for place, section in _sections(config):
        _check_section(section, place, path, trust_remote_code=trust_remote_code)
    known = known_architectures()
    if known and model_type not in {*known, OURS} and "auto_map" not in config:
        raise CheckpointError(
            f"architecture must be a causal language model that the installed transformers knows: {path} has "
            f"model_type {model_type!r}.{nearest(model_type, {*known, OURS})}"
        )
    check_sizes(sizes_of(config, path), path)
    return model_type


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object in a config, itself first, with its dotted place."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        place, node = waiting.pop()
        if isinstance(node, Mapping):
            yield place, node
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        waiting += [(f"{place}.{key}", value) for key, value in items if isinstance(value, Mapping | list)]


def _check_section(section: Mapping[str, Any], place: str, path: Path, *, trust_remote_code: bool) -> None:
    """What may stand at no depth of a config: code, kernels of the hub, dtypes and sizes that cannot be."""
    where = f"{path}{' in ' + place[1:] if place else ''}"
    for key, fault in _REFUSED.items():
        if section.get(key):
            raise CheckpointError(
                f"config.json must not set {key!r}, which {fault}: {where}. Remove the key."
            )
    for key in _CODE:
        if key in section and not trust_remote_code:
            raise CheckpointError(
                f"checkpoint asks to run code of its own: {where} has an {key}. quantlab runs it only with "
                f"--trust-remote-code; set that if you trust its author."
            )
    for key, value in section.items():
        # At the top the attention's is ours to choose: loading names one, whatever the config says.
        if "attn" in key and not place:
            continue
        if isinstance(value, str) and _IMPLEMENTATIONS.fullmatch(key) and not _PLAIN.fullmatch(value):
            raise CheckpointError(
                f"config.json must not set {key!r} to {value!r}, which is fetched and run: {where}. Remove the key."
            )
        if isinstance(value, str) and key in ("dtype", "torch_dtype") and not _DTYPE.fullmatch(value):
            raise CheckpointError(f"{key} must be a dtype such as 'bfloat16': {where} has {value!r}.")
        if isinstance(value, float) and not isfinite(value):
            raise CheckpointError(f"{key} must be finite: {where} has {value}.")
    if place.endswith("_config") and section.get("quantization_config"):
        raise CheckpointError(
            f"config.json must not set 'quantization_config' within a part of the model: {where} has one."
        )
    _check_largest(section, where)


def _check_largest(section: Mapping[str, Any], where: str) -> None:
    limits = {name: largest for names, largest in SIZES.values() for name in names} | {
        "num_labels": MAX_LABELS
    }
    for name in limits.keys() & section.keys():
        if type(section[name]) is int and section[name] > limits[name]:
            raise CheckpointError(
                f"{_size_of(name)} must be 1 to {limits[name]}: {where} has {section[name]}."
            )


def _size_of(name: str) -> str:
    return next((size for size, (names, _) in SIZES.items() if name in names), name)


def sizes_of(config: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The sizes that a config states, under the names of SIZES; a composite model's are its text model's.

    A size that differs between layers is checked and left out.
    """
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, dict) else config
    sizes: dict[str, int] = {}
    for size, (names, _) in SIZES.items():
        name = next((name for name in names if merged.get(name) is not None), None)
        if name is None:
            continue
        if isinstance(merged[name], list) and size in MAY_DIFFER:
            _check_list(size, name, merged[name], path)
            continue
        if type(merged[name]) is not int:
            raise CheckpointError(f"{name} must be a whole number: {path} has {merged[name]!r}.")
        sizes[size] = merged[name]
    for name in ("rope_scaling", "rope_parameters", "text_config"):
        if not isinstance(merged.get(name), dict | None):
            raise CheckpointError(f"{name} must be an object or null: {path} has {merged[name]!r}.")
    return sizes


def check_sizes(sizes: Mapping[str, int], path: Path) -> None:
    """Sizes are positive, believable, and heads divide what they split."""
    for size, value in sizes.items():
        _check_size(size, value, path)
    heads, hidden = sizes.get("num_attention_heads"), sizes.get("hidden_size")
    if heads and hidden and "head_dim" not in sizes and hidden % heads:
        raise CheckpointError(
            f"num_attention_heads must divide hidden_size where there is no head_dim: {path} has {heads} heads for "
            f"hidden_size {hidden}."
        )
    kv_heads = sizes.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise CheckpointError(
            f"num_key_value_heads must divide num_attention_heads: {path} has {kv_heads} and {heads}."
        )


def _check_size(size: str, value: int, path: Path) -> None:
    smallest, largest = int(size not in MAY_BE_ZERO), SIZES[size][1]
    if not smallest <= value <= largest:
        raise CheckpointError(f"{size} must be {smallest} to {largest}: {path} has {value}.")


def _check_list(size: str, name: str, values: list[Any], path: Path) -> None:
    if (
        not values
        or len(values) > SIZES["num_hidden_layers"][1]
        or not all(type(value) is int for value in values)
    ):
        raise CheckpointError(
            f"{name} must be a whole number, or a list of one for each layer: {path} has {str(values)[:100]}."
        )
    for value in values:
        _check_size(size, value, path)

"""What a config predicts of the tensors' shapes, held against the headers; and which tensors are linears. No torch.

Checked here is what every config tells (number of layers, embedding rows and width) and, for families shaped like
Llama, every projection. The rest is left to the model class, which reports what does not fit while it loads.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from quantlab.errors import CheckpointError
from quantlab.models.families import Family

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embed")
"""Last part of the name of an input embedding."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")

Sizes = Mapping[str, int]
Shape = tuple[int, ...]
Tensors = Mapping[str, tuple[str, Shape]]


def check_shapes(tensors: Tensors, sizes: Sizes, family: Family, path: Path) -> int:
    """Hold the tensors' shapes against the config; returns the rows of the input embedding.

    Raises:
        CheckpointError: a tensor that disagrees, or none where the config asks for one.
    """
    _check_layers(tensors, sizes, path)
    predicted = _predicted(sizes, family)
    rows = 0
    for name, (_, shape) in tensors.items():
        module, _, leaf = name.rpartition(".")
        last = module.rpartition(".")[2]
        if last in EMBEDDINGS and leaf == "weight" and len(shape) == 2 and not _LAYER.search(name):
            rows = shape[0]
            _check_embedding(name, shape, sizes, path)
        elif leaf == "weight" and last in predicted and _LAYER.search(name) and shape != predicted[last]:
            raise _disagrees(name, shape, predicted[last], path)
    if not rows:
        raise CheckpointError(f"checkpoint must hold an input embedding: {path} has none among its tensors.")
    return rows


def linears_of(tensors: Tensors, family: Family) -> dict[str, tuple[int, int]]:
    """Module name -> (out_features, in_features) of every matrix in the decoder layers."""
    linears = {}
    for name, (_, shape) in tensors.items():
        if name.endswith(".weight") and len(shape) == 2 and _LAYER.search(name):
            rows, columns = shape[::-1] if family.transposed_linears else shape
            linears[name.removesuffix(".weight")] = (rows, columns)
    return linears


def _check_layers(tensors: Tensors, sizes: Sizes, path: Path) -> None:
    """The layers are numbered 0 to num_hidden_layers - 1."""
    found = {int(match[1]) for name in tensors if (match := _LAYER.search(name))}
    expected = sizes.get("num_hidden_layers")
    if expected is None or found == set(range(expected)):
        return
    missing = sorted(set(range(expected)) - found) if expected <= len(tensors) else []
    fault = f"layer {missing[0]} is missing" if missing else f"there are {len(found)} layers"
    raise CheckpointError(
        f"tensors must agree with the config: {path} has num_hidden_layers {expected}, but {fault}."
    )


def _check_embedding(name: str, shape: Shape, sizes: Sizes, path: Path) -> None:
    # An embedding may be narrower than the model (OPT 350M projects it), so its width is known only where both are.
    vocab_size, hidden = sizes.get("vocab_size"), sizes.get("embedding_size", sizes.get("hidden_size"))
    expected = (vocab_size or shape[0], hidden or shape[1])
    if shape != expected:
        raise _disagrees(name, shape, expected, path)


def _predicted(sizes: Sizes, family: Family) -> dict[str, Shape]:
    """Last part of a projection's name -> its shape, for what the config says in full."""
    try:
        hidden, heads, inner = (sizes[k] for k in ("hidden_size", "num_attention_heads", "intermediate_size"))
    except KeyError:
        return {}
    if not family.llama_shapes:
        return {}
    shapes: dict[str, Shape] = {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    head_dim = sizes.get("head_dim", hidden // heads if family.head_dim_from_hidden else None)
    if head_dim is None:
        return shapes
    shapes |= {"q_proj": (heads * head_dim, hidden), "o_proj": (hidden, heads * head_dim)}
    if kv_heads := sizes.get("num_key_value_heads"):
        shapes |= dict.fromkeys(("k_proj", "v_proj"), (kv_heads * head_dim, hidden))
    return shapes


def _disagrees(name: str, found: Shape, expected: Shape, path: Path) -> CheckpointError:
    return CheckpointError(
        f"tensors must agree with the config: {path} holds {name!r} of shape {list(found)}, the config asks for "
        f"{list(expected)}."
    )

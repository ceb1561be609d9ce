"""What a config predicts of the tensors' shapes, held against the headers; and which tensors are linears. No torch.

Checked here is what every config tells (number of layers, embedding rows and width) and, for families shaped like
Llama, every projection. The rest is left to the model class, which reports what does not fit while it loads: layers
and embeddings of names unknown here, and layers past the last, some of which it knows and leaves out.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from quantlab.errors import CheckpointError
from quantlab.inspection.families import Family
from quantlab.inspection.layers import Layers

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embed", "embeddings",
              "tokens_embed", "w")  # fmt: skip
"""Last part of the name of an input embedding; `w` is CTRL's."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")

Sizes = Mapping[str, int]
Shape = tuple[int, ...]
Tensors = Mapping[str, tuple[str, Shape]]


def check_shapes(tensors: Tensors, sizes: Sizes, layers: Layers, family: Family, path: Path) -> int:
    """Hold the tensors' shapes against the config; returns the rows of the input embedding.

    Where it goes by a name that is not known here they are the config's vocab_size, or 0 where it has none.

    Raises:
        CheckpointError: a tensor that disagrees, or a layer that is missing.
    """
    _check_layers(tensors, layers, path)
    _check_counts(tensors, sizes, layers, path)
    predicted = _predicted(sizes, family)
    rows = sizes.get("vocab_size", 0)
    for name, (_, shape) in tensors.items():
        module, _, leaf = name.rpartition(".")
        last = module.rpartition(".")[2]
        if last in EMBEDDINGS and leaf == "weight" and len(shape) == 2 and not _LAYER.search(name):
            rows = shape[0]
            _check_embedding(name, shape, sizes, path)
        elif leaf == "weight" and last in predicted and _LAYER.search(name) and shape != predicted[last]:
            raise _disagrees(name, shape, predicted[last], path)
    head = tensors.get("lm_head.weight", ("", ()))[1]
    if len(head) == 2 and head[0] != sizes.get("vocab_size", head[0]):
        raise _disagrees("lm_head.weight", head, (sizes["vocab_size"], head[1]), path)
    return rows


def check_one_block(names: Iterable[str], layers: Layers, path: Path) -> None:
    """Where one block serves all layers, the weights of no other are stored: the model would not read them.

    Raises:
        CheckpointError: some are.
    """
    for name in names if layers.share_a_block else ():
        if (layer := _LAYER.search(name)) and name.endswith(".weight") and int(layer[1]):
            raise CheckpointError(
                f"tensors must agree with the config: {path} has one block for all layers, stored as layer 0, but "
                f"holds {name!r} too."
            )


def linears_of(tensors: Tensors, layers: Layers, family: Family) -> dict[str, tuple[int, int]]:
    """Module name in the loaded model -> (out_features, in_features) of every matrix in its decoder layers."""
    prefix = f"{family.base_prefix}." if family.base_prefix else ""
    linears = {}
    for name, (_, shape) in tensors.items():
        layer = _LAYER.search(name)
        if not name.endswith(".weight") or len(shape) != 2 or layer is None:
            continue
        # Stored past the last layer are those that predict further tokens, which the model does not have.
        for index in layers.of_stored(int(layer[1])):
            own = f"{name[: layer.start(1)]}{index}{name[layer.end(1) :]}"
            rows, columns = shape[::-1] if family.linear_class == "Conv1D" else shape
            linears[prefix + own.removeprefix(prefix).removesuffix(".weight")] = (rows, columns)
    return linears


def _check_layers(tensors: Tensors, layers: Layers, path: Path) -> None:
    """Every layer that a checkpoint stores is there, where layers go by a name that is known here."""
    found = {int(match[1]) for name in tensors if (match := _LAYER.search(name))}
    missing = set(range(layers.num_stored or 0)) - found
    if found and missing:
        raise CheckpointError(
            f"tensors must agree with the config: {path} has num_hidden_layers {layers.num_in_model}, but "
            f"layer {min(missing)} is missing."
        )


def _check_counts(tensors: Tensors, sizes: Sizes, layers: Layers, path: Path) -> None:
    """A layer has a tensor, an expert a tensor or a row of one: a model of more is not built to find that out."""
    widest = max((size for _, shape in tensors.values() for size in shape), default=0)
    counts = {"num_hidden_layers": layers.num_stored or 0, "num_experts": sizes.get("num_experts", 0)}
    bounds = {"num_hidden_layers": len(tensors), "num_experts": max(len(tensors), widest)}
    for size, bound in bounds.items():
        if counts[size] > bound:
            raise CheckpointError(
                f"tensors must agree with the config: {path} has {size} {counts[size]}, but tensors for {bound} at "
                "most."
            )
    for name, (_, shape) in tensors.items():
        positions = sizes.get("max_position_embeddings", shape[0] if shape else 0)
        if name.endswith(("wpe.weight", "position_embd.weight")) and shape and shape[0] != positions:
            raise _disagrees(name, shape, (positions, *shape[1:]), path)


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

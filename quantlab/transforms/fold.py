"""Fold: the gain of every norm moves into the linears that read it, so that the norm is the same for every channel.

    W (g * n + b) = (W diag(g)) n + W b

What a norm adds goes into the readers' biases. Quantizers then see the gain where it acts, and an RMS norm without a
gain commutes with rotation (QuaRot, arXiv:2404.00456, section 3; SliceGPT, arXiv:2401.15024).
"""

import torch
from torch import Tensor, nn

from quantlab.transforms.edges import Edge, find_edges, graph_for
from quantlab.transforms.edit import (
    Undo,
    copy_with,
    locate,
    matrix_of,
    replace_,
    set_bias_,
    set_vector_,
)
from quantlab.transforms.scaling import divide_shifts_, multiply_readers_

__all__ = ["fold_", "fold_final_", "fold_norm_", "untie_"]


def fold_(model: nn.Module, undo: Undo) -> list[str]:
    """Fold every declared norm of the decoder layers; returns what there is to say, nothing as a rule.

    Raises:
        SchemeError: the architecture is not declared.
    """
    for edge in find_edges(model, ("norm", "head_norm")):
        fold_norm_(model, edge, undo)
    return []


def fold_norm_(model: nn.Module, edge: Edge, undo: Undo) -> None:
    """Fold the gain and bias of one norm; nothing happens to one that has none, or 1s."""
    norm, _ = locate(model, edge.source)
    gain = getattr(norm, "weight", None)
    if gain is None:
        return
    gain_S = gain.detach().double() + edge.offset
    if bool((gain_S == 1).all()) and getattr(norm, "bias", None) is None:
        return
    values = {"weight": torch.full_like(gain_S, 1.0 - edge.offset)}
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias_I = bias.detach().double()[list(edge.source_of)]
        for name in edge.readers:
            _add_to_bias_(model, name, bias_I, undo)
        values["bias"] = torch.zeros_like(gain_S)
    divide_shifts_(model, edge, gain_S, undo)
    multiply_readers_(model, edge, gain_S, undo)
    set_vector_(model, edge.source, undo, **values)


def _add_to_bias_(model: nn.Module, name: str, inputs_I: Tensor, undo: Undo) -> None:
    module, parameter = locate(model, name)
    old = getattr(module, "bias", None)
    added = matrix_of(module, parameter) @ inputs_I
    set_bias_(model, name, added if old is None else old.detach().double() + added, undo)


def fold_final_(model: nn.Module, undo: Undo) -> list[str]:
    """Fold the last norm into the head, which gets a matrix of its own where it was tied to the embedding.

    Returns:
        what was untied, in a sentence.
    """
    residual = graph_for(model).residual
    assert residual is not None, "callers ask for a declared residual stream"
    notes = untie_(model, residual.embedding, residual.head, undo)
    head, _ = locate(model, residual.head)
    source_of = tuple(range(matrix_of(head).shape[1]))
    fold_norm_(model, Edge("norm", residual.final_norm, (residual.head,), source_of), undo)
    return notes


def untie_(model: nn.Module, embedding: str, head: str, undo: Undo) -> list[str]:
    """Give the head a matrix of its own where it shares the embedding's; returns a sentence that says so."""
    (rows, _), (linear, _) = locate(model, embedding), locate(model, head)
    if rows.weight is not linear.weight:
        return []
    replace_(model, linear, copy_with(linear, weight=matrix_of(linear)), undo)
    config = model.config
    undo.append((config, "tie_word_embeddings", config.tie_word_embeddings))  # type: ignore[union-attr]
    config.tie_word_embeddings = False  # type: ignore[union-attr]
    return [
        f"{head} was tied to {embedding} and has its own matrix now: {matrix_of(linear).numel()} values more."
    ]

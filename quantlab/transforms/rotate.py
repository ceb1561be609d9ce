"""Rotate: orthogonal matrices between linears, which spread large channels over all and leave the function.

    residual   h' = h Q: the embedding and whatever writes to the residual stream turn by Q, whatever reads it by Q too,
               which RMS norms without gains let pass: |h Q| = |h|; gains are folded first
    values     v' = v R for each value head, undone in the output projection; a gain in between is folded first
    heads      inputs of attention's output projection, all heads side by side, are rotated as they arrive, by a
               Hadamard matrix, undone in its weight: a head that stands out no rotation within heads can spread
    down       inputs of the FFN's last linear likewise

What is rotated as it arrives leaves the function whatever stands in front of it, norms and gates of heads too. QuaRot
applies the factor of its matrix that acts across heads as inputs arrive and has the other, within a head, in the
weights; here R is in the weights and the whole matrix is applied.

Weights are multiplied in float64 and rounded once. Random signs and a Hadamard matrix make Q and R. Source: QuaRot,
arXiv:2404.00456; residual and values are R1 and R2 of SpinQuant, arXiv:2405.16406.

Letters: D hidden channels, C channels of a value head, O outputs, I inputs.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from quantlab.errors import SchemeError
from quantlab.inspection.graph import Graph
from quantlab.layers.rotated import RotatedLinear
from quantlab.transforms.edges import ValueHeads, find_edges, graph_for, layer_names, value_heads
from quantlab.transforms.edit import Undo, locate, matrix_of, replace_, set_matrix_
from quantlab.transforms.fold import fold_final_, fold_norm_
from quantlab.transforms.hadamard import apply_factors, factors_of, hadamard_order, random_rotation

__all__ = ["PARTS", "check_parts", "declared_parts", "fold_residual_", "rotate_", "rotate_residual_"]

Turn = Callable[[Tensor], Tensor]
PARTS = ("residual", "values", "heads", "down")
"""What can be rotated."""


def rotate_(model: nn.Module, undo: Undo, *, seed: int = 0, parts: Sequence[str] = PARTS) -> list[str]:
    """Rotate the parts of a model.

    Args:
        seed: of the random signs (and of the matrix itself, for sizes without a Hadamard matrix).
        parts: of `PARTS`.

    Returns:
        what there is to say: a head that was tied, a size without a Hadamard matrix.

    Raises:
        SchemeError: the architecture does not declare a part.
    """
    check_parts(model, parts)
    generator, graph, notes = torch.Generator().manual_seed(seed), graph_for(model), []
    if "residual" in parts:
        notes += fold_residual_(model, undo)
        size = matrix_of(locate(model, _embedding_of(graph))[0]).shape[1]
        notes += _sizes(["residual stream"], [size])
        rotate_residual_(model, random_rotation(size, generator), undo)
    if "values" in parts:
        _rotate_values_(model, graph, generator, undo)
    if "heads" in parts:
        assert graph.values is not None, "checked above"
        notes += _rotate_inputs_(model, graph, graph.values.target, undo)
    if "down" in parts:
        notes += _rotate_inputs_(model, graph, graph.down, undo)
    return notes


def _rotate_inputs_(model: nn.Module, graph: Graph, linear_of_layer: str, undo: Undo) -> list[str]:
    """Let one linear of every layer rotate its inputs; notes."""
    names = _each_once(model, (prefix + linear_of_layer for prefix in layer_names(model, graph)))
    for name in names:
        linear, _ = locate(model, name)
        if not isinstance(linear, RotatedLinear):
            replace_(model, linear, RotatedLinear(linear), undo)
    return _sizes(names, [matrix_of(locate(model, name)[0]).shape[1] for name in names])


def declared_parts(model: nn.Module) -> tuple[str, ...]:
    """The parts that the model's architecture declares.

    Raises:
        SchemeError: the architecture is not declared at all.
    """
    graph = graph_for(model)
    lacks = {
        "residual": graph.residual is None,
        "values": graph.values is None,
        "heads": graph.values is None,
        "down": not graph.down,
    }
    return tuple(part for part in PARTS if not lacks[part])


def fold_residual_(model: nn.Module, undo: Undo) -> list[str]:
    """Fold every norm that reads the residual stream, the last one too; returns what was untied."""
    for edge in find_edges(model, ("norm",)):
        fold_norm_(model, edge, undo)
    return fold_final_(model, undo)


def rotate_residual_(model: nn.Module, turn: Turn, undo: Undo) -> None:
    """h' = h Q; norms must be folded, which the guard sees if they are not."""
    graph = graph_for(model)
    residual = graph.residual
    assert residual is not None, "callers check the parts"
    readers = [name for edge in find_edges(model, ("norm",)) for name in edge.readers]
    for name in (residual.embedding, residual.head, *readers):
        set_matrix_(model, name, turn(matrix_of(*locate(model, name))), undo)
    writers = [prefix + name for prefix in layer_names(model, graph) for name in residual.writers]
    for name in _each_once(model, writers):
        linear, _ = locate(model, name)
        others = {"bias": turn(linear.bias.detach().double())} if isinstance(linear.bias, Tensor) else {}
        set_matrix_(model, name, turn(matrix_of(linear).T).T, undo, **others)


def _rotate_values_(model: nn.Module, graph: Graph, generator: torch.Generator, undo: Undo) -> None:
    """v' = v R, one R a layer for all of its heads."""
    assert graph.values is not None, "callers check the parts"
    layers = [value_heads(model, graph.values, prefix) for prefix in layer_names(model, graph)]
    once = set(_each_once(model, (heads.source for heads in layers)))
    gains = {edge.source: edge for edge in find_edges(model, ("head_norm",))}
    for heads in layers:
        if heads.source in once:
            if heads.gain is not None:
                fold_norm_(model, gains[heads.gain], undo)
            rotate_heads_(model, heads, random_rotation(heads.width, generator).matrix, undo)


def rotate_heads_(model: nn.Module, heads: ValueHeads, r_CC: Tensor, undo: Undo) -> None:
    """v' = v R in every head of one layer; a gain between the values and their reader must be folded."""
    source, target = locate(model, heads.source)[0], locate(model, heads.target)[0]
    rows, matrix_OI, columns_OI = list(heads.rows), matrix_of(source), matrix_of(target)
    r = r_CC.to(matrix_OI)
    matrix_OI = matrix_OI.clone()
    matrix_OI[rows] = (r.T @ matrix_OI[rows].unflatten(0, (-1, heads.width))).flatten(0, 1)
    others = {}
    if isinstance(source.bias, Tensor):
        bias_O = source.bias.detach().double().clone()
        bias_O[rows] = (bias_O[rows].unflatten(0, (-1, heads.width)) @ r).flatten()
        others["bias"] = bias_O
    set_matrix_(model, heads.source, matrix_OI, undo, **others)
    # A reader that rotates its inputs already holds its columns turned.
    factors = [factor.to(matrix_OI) for factor in factors_of(columns_OI.shape[1])]
    if isinstance(target, RotatedLinear):
        columns_OI = apply_factors(columns_OI, [factor.T for factor in factors])
    turned_OI = (columns_OI.unflatten(1, (-1, heads.width)) @ r).flatten(1)
    if isinstance(target, RotatedLinear):
        turned_OI = apply_factors(turned_OI, factors)
    set_matrix_(model, heads.target, turned_OI, undo)
    for name in heads.inner:
        set_matrix_(model, name, r.T @ matrix_of(locate(model, name)[0]) @ r, undo)


def _each_once(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of different modules: layers may share theirs."""
    return list({id(locate(model, name)[0]): name for name in reversed(list(names))}.values())[::-1]


def _embedding_of(graph: Graph) -> str:
    assert graph.residual is not None, "callers check the parts"
    return graph.residual.embedding


def check_parts(model: nn.Module, parts: Sequence[str], what: str = "rotate") -> None:
    """Refuse parts that the model's architecture does not declare; `what` asks for them."""
    declared, graph = declared_parts(model), graph_for(model)
    for part in parts:
        if part not in PARTS:
            raise SchemeError(f"parts of rotate are {', '.join(PARTS)}: found {part!r}.")
        if part not in declared:
            why = f", since {graph.unrotated}" if part == "residual" and graph.unrotated else ""
            rest = [each for each in parts if each in declared]
            instead = (
                f", or rotate {' and '.join(rest)} alone (quantize.transforms.rotate_parts)" if rest else ""
            )
            raise SchemeError(
                f"{type(model).__name__} does not declare that its {part} may be rotated{why}. Leave {what} out"
                f"{instead if what == 'rotate' or 'residual' in rest else ''}."
            )


def _sizes(names: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """A sentence on each size that no Hadamard matrix of ours has."""
    return [
        f"no Hadamard matrix of size {size} is built here, so a random orthogonal one of its odd part serves: {name}."
        for name, size in dict(zip(names, sizes, strict=True)).items()
        if hadamard_order(size) is None
    ]

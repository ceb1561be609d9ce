"""The declared places of a model where scale may pass, found in it: `find_edges`.

Letters: I input channels of the readers, S channels of the source; `source_of` says which of S each of I reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from quantlab.errors import SchemeError
from quantlab.inspection.graph import Graph, Values, graph_of, rows_of, sources_of
from quantlab.transforms.edit import locate, matrix_of

__all__ = ["Edge", "ValueHeads", "find_edges", "graph_for", "layer_names", "value_heads"]

Kind = Literal["norm", "head_norm", "link", "values"]


@dataclass(frozen=True)
class Edge:
    """A source, and everything that reads it."""

    kind: Kind
    """norm: of the residual stream; head_norm: of attention's heads; link: within the FFN; values: v to o."""
    source: str
    """Name of the norm or linear."""
    readers: tuple[str, ...]
    """Names of linears, or of parameters that read as a linear of one output does."""
    source_of: tuple[int, ...]
    """For each input channel of the readers, the channel of the source."""
    rows: tuple[int, ...] = ()
    """Of a linear source: its row that makes channel s."""
    shifts: tuple[str, ...] = ()
    """Parameters that are added in between."""
    offset: float = 0.0
    """The norm multiplies by offset + weight: 1 in Gemma."""

    @property
    def num_sources(self) -> int:
        """S."""
        return max(self.source_of) + 1


@dataclass(frozen=True)
class ValueHeads:
    """Value heads of one layer, as rotations and scales see them."""

    source: str
    target: str
    rows: tuple[int, ...]
    """Row of the source that makes channel c of value head j, at j * width + c."""
    width: int
    gain: str | None
    inner: tuple[str, ...]


def graph_for(model: nn.Module) -> Graph:
    """What is declared of the model's architecture.

    Raises:
        SchemeError: nothing is, or the config has a field that the graph does not cover.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    variant, options = getattr(config, "variant", None), getattr(config, "variant_options", None)
    graph = graph_of(config.model_type, variant, options)
    called = f"{config.model_type}{f' ({variant})' if variant else ''}"
    if graph is None:
        raise SchemeError(
            f"a transform needs a declared graph of which modules may exchange scale or rotation: {called} has none. "
            "Leave the transform out, or declare it in quantlab/inspection/graph.py."
        )
    for field, value in graph.needs:
        if getattr(config, field, value) != value:
            raise SchemeError(
                f"the graph of {called} holds where {field} is {value}: this config has "
                f"{getattr(config, field)}. Leave the transform out."
            )
    return graph


def layer_names(model: nn.Module, graph: Graph) -> list[str]:
    """Prefixes of the decoder layers, such as `model.layers.0.`."""
    layers, _ = locate(model, graph.layers)
    assert isinstance(layers, nn.ModuleList)
    return [f"{graph.layers}.{index}." for index in range(len(layers))]


def find_edges(
    model: nn.Module, kinds: Sequence[Kind] = ("norm", "head_norm", "link", "values")
) -> list[Edge]:
    """Every declared edge of some kinds, layer by layer; modules that layers share are there once.

    Raises:
        SchemeError: the architecture is not declared.
    """
    graph = graph_for(model)
    found: dict[tuple[int, ...], Edge] = {}
    for prefix in layer_names(model, graph):
        for edge in _edges_of(model, graph, prefix):
            modules = tuple(id(locate(model, name)[0]) for name in (edge.source, *edge.readers))
            found.setdefault(modules, edge)
    return [edge for edge in found.values() if edge.kind in kinds]


def _edges_of(model: nn.Module, graph: Graph, prefix: str) -> list[Edge]:
    edges = []
    for norm in graph.norms:
        readers = tuple(prefix + name for name in norm.readers)
        shifts = tuple(prefix + name for name in norm.shifts)
        gain = getattr(locate(model, prefix + norm.name)[0], "weight", None)
        count = _num_inputs(model, readers[0])
        width = count if gain is None else gain.numel()
        source_of = tuple(channel % width for channel in range(count))
        kind: Kind = "head_norm" if norm.repeated else "norm"
        edges.append(Edge(kind, prefix + norm.name, readers, source_of, (), shifts, graph.norm_offset))
    for link in graph.links:
        rows = rows_of(link.rows, _num_outputs(model, prefix + link.source), 1, 0)
        target = prefix + link.target
        edges.append(Edge("link", prefix + link.source, (target,), tuple(range(len(rows))), tuple(rows)))
    if graph.values is not None and graph.values.scales:
        heads = value_heads(model, graph.values, prefix)
        count = _num_inputs(model, heads.target)
        source_of = tuple(sources_of(count, len(heads.rows), heads.width))
        edges.append(Edge("values", heads.source, (heads.target,), source_of, heads.rows))
    return edges


def value_heads(model: nn.Module, values: Values, prefix: str) -> ValueHeads:
    """The value heads of the layer whose names start with `prefix`."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = config.num_attention_heads
    width = values.width * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    num_values = getattr(config, "num_key_value_heads", None) or heads
    rows = rows_of(values.rows, _num_outputs(model, prefix + values.source), width, num_values)
    gain = None if values.gain is None else prefix + values.gain
    inner = tuple(prefix + name for name in values.inner)
    return ValueHeads(prefix + values.source, prefix + values.target, tuple(rows), width, gain, inner)


def _num_inputs(model: nn.Module, name: str) -> int:
    return matrix_shape(model, name)[1]


def _num_outputs(model: nn.Module, name: str) -> int:
    return matrix_shape(model, name)[0]


def matrix_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """(outputs, inputs) of a linear or vector."""
    module, parameter = locate(model, name)
    return tuple(matrix_of(module, parameter).shape)  # type: ignore[return-value]

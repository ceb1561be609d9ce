"""Named places of a model: decoder layers, attention layers, and the sites inside attention.

Everything observable is a named module. Linears and norms are already; what enters the attention product, and the
logits and probabilities that it makes, become so through `Site` modules that live on every attention layer inside
`attention_sites(model)`:

    <attention layer>.attn_query     [B, H, q, d] as it enters the product: after rotary embedding
    <attention layer>.attn_key       [B, K, T, d] likewise, after the cache; heads that share keys are not repeated
    <attention layer>.attn_value     [B, K, T, dv] likewise; once for each call (DiffLlama makes two, half of v each)
    <attention layer>.attn_logits    after scale, soft-cap and bias, before the mask
    <attention layer>.attn_probs     after the softmax
    <attention layer>.attn_effective A1 - lambda A2, where a layer joins its maps before the values

The first three are called once, `site(x, tokens)`; the maps come in blocks of queries, `site(x, block)`.

Letters: B sequences, H heads (softmax maps), K key heads, q query rows of a block (or of the call), t keys of a block,
T keys of the call, d channels.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from probes.errors import ProbeError, nearest


@dataclass(frozen=True)
class QueryBlock:
    """Which queries and keys a tensor [B, H, q, t] at a site covers. A query's row is whole within its block.

    Keys that no query of the block may see can be left out, so t is at most `num_keys`: column j is key
    `key_start + j` of the attention call, row i is its query `start + i`.
    """

    visible: Tensor
    """bool, broadcastable to [B, H, q, t]: what the mask lets each query see. Count nothing else."""
    start: int
    """First query row of the block."""
    key_start: int
    """Key of column 0."""
    num_queries: int
    """Query rows of the whole attention call."""
    num_keys: int
    """Keys of the whole attention call."""
    seen_by_all: tuple[int, int] = (0, 0)
    """Columns [first, last) that every query of the block sees in every sequence and head: no mask is needed there."""

    @property
    def is_last(self) -> bool:
        """Whether this is the last block of its attention call."""
        return self.start + self.visible.shape[-2] >= self.num_queries

    def of_heads(self, heads: Sequence[int]) -> "QueryBlock":
        """The block of some heads only, where the mask differs between heads."""
        return replace(self, visible=self.visible[:, list(heads)])

    def visible_parts(self, x_BHqt: Tensor) -> list[Tensor]:
        """The visible values of x, each once, as a few tensors of any shape; cheaper than `x[visible]`."""
        first, last = self.seen_by_all
        columns = [(0, first), (last, x_BHqt.shape[-1])]
        parts = [x_BHqt[..., first:last]] if last > first else []
        for a, b in columns:
            if b > a:
                parts.append(x_BHqt[..., a:b].masked_select(self.visible[..., a:b]))
        return [part for part in parts if part.numel()]


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a tensor [B, heads, T, d] are text: a query that sees some key, a key that some query sees."""

    find: Callable[[], Tensor]
    """What finds them, only when they are asked for: it evaluates the whole mask."""

    @cached_property
    def visible(self) -> Tensor:
        """bool [B or 1, 1, T, 1]. Count nothing else."""
        return self.find()


@dataclass(frozen=True)
class Newest:
    """Which keys a query reads as they are: its last `window`, and those before them that fill no `step` yet."""

    window: int
    """Keys up to the query's own, counted by their index in the sequence; at least 1."""
    step: int = 1
    """Keys that enter the cache at a time, counted from the sequence's first."""
    first: Tensor | None = None
    """[B or 1, 1, 1, 1]: key of each sequence's first token, behind its padding; needed where step is above 1."""


@dataclass(frozen=True)
class Aged:
    """Keys or values of which each query sees the newest as they are, and older ones from a cache."""

    recent: Tensor
    """[B, K, T, d]."""
    past: Tensor
    """The same as the cache gives them back."""
    newest: Newest
    """Which of the two a query reads."""


class Site(nn.Identity):
    """A place inside attention: gives back what it gets, so that a forward hook can look at it.

    The attention function calls the site of a map once per block, with a `QueryBlock`, and the sites of queries, keys
    and values once per call, with `Tokens`. A hook must copy what it keeps: the tensor is reused as soon as the hook
    returns.
    """

    spans_rows = False

    def forward(self, x: Tensor, where: QueryBlock | Tokens) -> Tensor:  # type: ignore[override]
        """x itself."""
        return x


@runtime_checkable
class SwappedSite(Protocol):
    """What a module must have to stand in the place of the `Site` of a map (a quantizer does).

    `forward(x_BHqt, block)` gives the tensor that attention goes on with; it sees one block at a time. When
    `spans_rows` is true, the result depends on more rows than one block holds: the attention function then first
    walks all blocks, calling `begin()` once and `observe(x_BHqt, block)` for each, and walks them again calling the
    module. So a scale over a whole map never depends on the size of a block.

    In the place of queries, keys and values, `forward(x, tokens)` is all that is needed; those of keys and values may
    give back `Aged`.
    """

    spans_rows: bool

    def begin(self) -> None:
        """Forget the range of the last attention call."""

    def observe(self, x_BHqt: Tensor, block: QueryBlock) -> None:
        """Take the visible values of one block into the range."""


def select(model: nn.Module, pattern: str | Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Modules whose dotted name matches a pattern (`*` matches any text, dots too), in the model's order.

    Raises:
        ProbeError: a pattern matches nothing; the message names what exists.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    modules = dict(model.named_modules())
    matched = [{name for name in modules if fnmatchcase(name, each)} for each in patterns]
    for each, names in zip(patterns, matched, strict=True):
        if not names:
            raise _unmatched(model, each, modules)
    found = set().union(*matched)
    return [(name, module) for name, module in modules.items() if name in found]


def _unmatched(model: nn.Module, pattern: str, names: Iterable[str]) -> ProbeError:
    """The error about a pattern that matches nothing: what there is, layer numbers written `*`, each once."""
    known = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names if name))
    inside = (
        " Attention has its sites (attn_query, attn_key, attn_value, attn_logits, attn_probs, attn_effective) inside "
        "attention_sites only."
    )
    return ProbeError(
        f"A pattern must match a module: {pattern!r} matches none of {type(model).__name__}, which has "
        f"{', '.join(known)}.{inside if 'attn_' in pattern else ''}{nearest(pattern, known)}"
    )


def _is_attention(module: nn.Module) -> bool:
    """An innermost module whose class is named Attention: no module inside it is named so too."""
    return "Attention" in type(module).__name__ and not any(
        "Attention" in type(inner).__name__ for inner in module.modules() if inner is not module
    )


def decoder_stack(model: nn.Module) -> tuple[str, nn.Module]:
    """The module that runs the decoder layers (`model.model` of most causal LMs), with its dotted name.

    Found structurally: the owner of the outermost `nn.ModuleList` with most attention layers inside.
    """
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in counts):
            count = sum(_is_attention(inner) for inner in module.modules())
            if count:
                counts[name] = count
    if not counts:
        raise ProbeError(
            f"A causal LM must hold its decoder layers in an nn.ModuleList whose elements contain attention: "
            f"{type(model).__name__} has none. Give a causal language model."
        )
    layers = max(counts, key=lambda name: counts[name])
    owner = layers.rpartition(".")[0]
    return owner, model.get_submodule(owner)


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers with their dotted names, first layer first."""
    owner, stack = decoder_stack(model)
    lists = [(name, child) for name, child in stack.named_children() if isinstance(child, nn.ModuleList)]
    name, layers = max(lists, key=lambda item: sum(_is_attention(inner) for inner in item[1].modules()))
    prefix = f"{owner}.{name}" if owner else name
    return [(f"{prefix}.{index}", layer) for index, layer in enumerate(layers)]


def attention_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The softmax attention modules inside the decoder layers, with their dotted names, first layer first."""
    return [
        (f"{name}.{inner_name}", inner)
        for name, layer in decoder_layers(model)
        for inner_name, inner in layer.named_modules()
        if inner_name and _is_attention(inner)
    ]


def num_maps(attention: nn.Module) -> int:
    """Softmax maps of an attention layer: its query heads, whatever its class calls them."""
    config = getattr(attention, "config", None)
    for holder, name in ((config, "num_attention_heads"), (attention, "num_heads"), (attention, "n_heads")):
        count = getattr(holder, name, None)
        if isinstance(count, int):
            return count
    raise ProbeError(
        f"An attention layer must say how many heads it has: {type(attention).__name__} has neither "
        "config.num_attention_heads nor num_heads. Declare map_of_head on it."
    )


def map_of_head(attention: nn.Module) -> tuple[int, ...]:
    """For each head of the logits, which softmax map of its differential pair it is: 0 (added) or 1 (subtracted).

    Ordinary attention has map 0 only. A module may declare `map_of_head` itself; DiffLlama pairs head h with h + H/2.
    """
    declared = getattr(attention, "map_of_head", None)
    if declared is not None:
        return tuple(int(entry) for entry in declared)
    heads = num_maps(attention)
    if type(attention).__name__.startswith("DiffLlama"):
        return tuple(int(head >= heads // 2) for head in range(heads))
    return (0,) * heads


def num_outputs(attention: nn.Module) -> int:
    """Heads whose outputs the output projection reads: those of its maps, unless the module declares `num_outputs`."""
    declared = getattr(attention, "num_outputs", None)
    return declared if isinstance(declared, int) else len(map_of_head(attention))

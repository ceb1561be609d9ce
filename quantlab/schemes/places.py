"""Places: what one letter of a scheme's name quantizes, and what may share a scale there.

w   weights of linears          c output channel, t tensor, gN groups of N along the input
a   inputs of linears           r token, t sequence, c channel of a sequence, gN groups within a token
q k v                           queries, keys and values as they enter the attention product (after rotary
                                embedding): r token of a head, t sequence, h head, c channel, gN within a head
kv  the cache of keys, values   r token of a head, gN within a head; c KIVI: keys per channel in groups of 32
                                tokens, values per token in groups of 32 channels; t, h only static; z is a real
                                minimum
l   attention logits            t tensor, m map (all heads of one of the two maps of differential attention, and
                                everything where there is one), h head, r query row; always named
p   attention probabilities     as l; never negative
e   effective maps              t, h, r: A1 - lambda A2, where attention joins its maps before the values
d   lambda of each token        r token (its heads), t sequence; diff_v2's, never negative
x   outputs of decoder layers   as a: the residual stream after each layer

What is never negative has codes 0 to 2^bits - 1 and scale = max / (2^bits - 1), so that no code stands for what cannot
be; a zero point would be 0.
"""

from dataclasses import dataclass

from quantlab.errors import SchemeError
from quantlab.schemes.spec import LETTER_OF, Granularity, TensorSpec

__all__ = ["CACHE_GROUP", "PLACES", "Place", "check_place", "explained"]

CACHE_GROUP = 32
"""Tokens of a channel, of keys, and channels of a token, of values, that share a scale of the cache where keys are per
channel (KIVI, arXiv:2402.02750)."""


@dataclass(frozen=True)
class Place:
    """What one letter of a name quantizes."""

    field: str
    what: str
    granularities: tuple[Granularity, ...]
    """Those that mean something there, default first."""
    static: tuple[Granularity, ...] = ()
    """Those that calibration can fix."""
    always_named: bool = False
    """Whether the default granularity is written too."""
    by_itself: tuple[Granularity, ...] | None = None
    """Those that need neither calibration nor a window; None for all."""
    never_negative: bool = False
    """Whether the grid begins at 0."""


_WITHIN_HEADS: tuple[Granularity, ...] = ("row", "tensor", "head", "channel", "group")
_FIXED: tuple[Granularity, ...] = ("tensor", "head", "channel")
_MAPS: tuple[Granularity, ...] = ("tensor", "map", "head", "row")
_JOINED: tuple[Granularity, ...] = ("tensor", "head", "row")

PLACES = {
    "w": Place("weights", "weights", ("channel", "tensor", "group")),
    "a": Place(
        "activations", "inputs of linears", ("row", "tensor", "channel", "group"), ("tensor", "channel")
    ),
    "q": Place("query", "queries", _WITHIN_HEADS, _FIXED),
    "k": Place("key", "keys", _WITHIN_HEADS, _FIXED),
    "v": Place("value", "values", _WITHIN_HEADS, _FIXED),
    "kv": Place("cache", "keys and values of the cache", _WITHIN_HEADS, _FIXED, by_itself=("row", "group")),
    "l": Place("logits", "attention logits", _MAPS, always_named=True),
    "p": Place("probs", "attention probabilities", _MAPS, always_named=True, never_negative=True),
    "e": Place("effective", "effective attention maps", _JOINED, always_named=True),
    "d": Place("lambdas", "lambda of each token", ("row", "tensor"), never_negative=True),
    "x": Place("hidden", "outputs of decoder layers", ("row", "tensor", "channel", "group")),
}
"""Letter -> place, in the order in which a name has them."""


def explained() -> dict[str, str]:
    """What each letter of a name means and what may follow it, in one line each."""
    return {f"{letter}N": _explained(place) for letter, place in PLACES.items()} | {
        "..z ..s": "after the granularity: with zero points (of kv: real minima); static, from calibration",
        "..m1 ..m2": "of l and p, after the granularity: only the added, or only the subtracted map",
        "..uN": "of kv: each query sees its last N keys and values unquantized",
        "kvNcuM": f"KIVI: keys per channel and {CACHE_GROUP} tokens, values per token and {CACHE_GROUP} channels",
        "..16": "untouched, and left out of the name: w16 alone is the baseline",
    }


def _explained(place: Place) -> str:
    offered = place.by_itself or place.granularities
    letters = [f"{LETTER_OF[each]}{'N' if each == 'group' else ''} {each}" for each in offered]
    default = "always named" if place.always_named else f"{letters[0].split()[0]} if left out"
    static = f"; static: {', '.join(LETTER_OF[g] for g in place.static)}" if place.static else ""
    grid = "; never negative, so codes 0 to 2^N - 1" if place.never_negative else ""
    return f"{place.what}, N bits (2 to 8), one scale per {', '.join(letters)} ({default}){static}{grid}"


def check_place(letter: str, spec: TensorSpec) -> None:
    """Refuse a spec that means nothing at the place of this letter.

    Raises:
        SchemeError: a granularity, static scale, map or window that the place does not have.
    """
    place = PLACES[letter]
    if spec.granularity not in place.granularities:
        known = ", ".join(f"{LETTER_OF[g]} ({g})" for g in place.granularities)
        raise SchemeError(
            f"{place.what} ({letter!r}) take a scale per {known}: found {LETTER_OF[spec.granularity]} "
            f"({spec.granularity})."
        )
    if spec.static and letter == "w":
        raise SchemeError("weights are always static: leave the 's' out.")
    if spec.static and spec.granularity not in place.static:
        known = " or ".join(f"{LETTER_OF[g]} ({g})" for g in place.static)
        instead = f"take static scales per {known}" if place.static else "have dynamic scales only"
        raise SchemeError(
            f"{place.what} {instead}: found {LETTER_OF[spec.granularity]}s. Leave the 's' out"
            f"{', or change the granularity' if place.static else ''}."
        )
    if place.never_negative and not spec.symmetric:
        raise SchemeError(
            f"{place.what} ({letter!r}) are never negative, so their codes begin at 0 and have no zero point: leave "
            "the 'z' out."
        )
    if spec.map is not None and letter not in ("l", "p"):
        raise SchemeError(
            f"a map is chosen of attention logits and probabilities only: leave m{spec.map} out."
        )
    if letter == "kv":
        _check_causal(spec)
    elif spec.window is not None:
        raise SchemeError(
            f"a window of unquantized keys is the cache's ('kv') alone: leave u{spec.window} out."
        )


def _check_causal(spec: TensorSpec) -> None:
    """Refuse a cache in which a scale would know of tokens that the query must not see."""
    if spec.static or spec.granularity in ("row", "group"):
        return
    if spec.granularity in ("tensor", "head"):
        raise SchemeError(
            f"a scale of the cache must not know of later tokens: kv{spec.bits}{spec.grain} spans the whole sequence. "
            f"Use kv{spec.bits}{spec.grain}s (static), or a scale per token (kv{spec.bits})."
        )
    if spec.window is None or spec.window % CACHE_GROUP:
        raise SchemeError(
            f"keys of the cache share a channel's scale over {CACHE_GROUP} tokens and are stored as many at a time as "
            f"the window holds, a multiple of {CACHE_GROUP}: found {f'u{spec.window}' if spec.window else 'no window'}"
            f". Use kv{spec.bits}cu128."
        )

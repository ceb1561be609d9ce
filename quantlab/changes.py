"""Changes: what a scheme did to every weight matrix and site of a model, and what the result weighs. No torch.

Sizes are those of codes packed densely. Scales count with the bits of the dtype that they are rounded to;
whatever is not quantized counts with 16 bits a value, also in a model that is computed, or stored, in 32.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Change", "Changes", "places"]

UNTOUCHED_BITS = 16
"""Bits of a value that stays as it is, whatever dtype it is computed in."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""A number in a dotted name; the first is the layer's."""


@dataclass(frozen=True)
class Change:
    """One weight matrix, or one attention site."""

    name: str
    """Dotted name in the model."""
    action: Literal["swapped", "skipped"]
    why: str
    """What it became, or why it stays."""
    bits: int
    """Bits that a weight carries; at a site, bits of a value that passes."""
    num_weights: int
    """Weights of the matrix; 0 at a site, and for a matrix tied to an earlier one."""
    kernel: str = ""
    """How it is computed: a name of `quantlab.kernels`."""
    storage_bits: int = 0
    """Bits of the whole matrix when packed, with its scales and zero points (`bits` each)."""
    in_decoder: bool = True
    """Whether it belongs to a decoder layer; only such weights enter the shares."""
    note: str = ""
    """What its method did otherwise than asked, such as a fallback; empty where it ran as asked."""


@dataclass(frozen=True)
class Changes:
    """The table of changes, with its sums. The baseline has no rows."""

    scheme: str
    """Canonical name."""
    rows: tuple[Change, ...]
    """In the model's order, sites last."""
    num_parameters: int
    """All parameters of the model; those in no row (norms, biases) count with 16 bits each."""
    notes: tuple[str, ...] = ()
    """What transforms have to say, such as a head that was untied."""

    @property
    def share_by_bits(self) -> dict[int, float]:
        """Bits -> share of the decoder's weights that carry them, fewest first; sums to 1."""
        counts: Counter[int] = Counter()
        for row in self._decoder_weights():
            counts[row.bits] += row.num_weights
        total = counts.total()
        return {bits: counts[bits] / total for bits in sorted(counts)} if total else {UNTOUCHED_BITS: 1.0}

    @property
    def average_storage_bits(self) -> float:
        """Packed bits per weight of the decoder, scales and zero points included."""
        rows = self._decoder_weights()
        total = sum(row.num_weights for row in rows)
        return sum(row.storage_bits for row in rows) / total if total else float(UNTOUCHED_BITS)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the whole model: packed codes, scales and zero points, everything else at 16 bits."""
        rest = self.num_parameters - sum(row.num_weights for row in self.rows)
        return (sum(row.storage_bits for row in self.rows) + rest * UNTOUCHED_BITS + 7) // 8

    def table(self) -> list[dict[str, Any]]:
        """The rows with layer numbers written as `*` and equal ones counted: `count`, then the fields of `Change`.

        A row with a note says of which layers it is, as in `layers: "0, 3-7"`, and keeps the numbers of experts; other
        rows have neither field.
        """
        alike: dict[tuple[tuple[str, Any], ...], list[str]] = {}
        for row in self.rows:
            name = _NUMBER.sub("*", row.name, count=1 if row.note else 0)
            fields = asdict(row) | {"name": name}
            if not row.note:
                del fields["note"]
            alike.setdefault(tuple(fields.items()), []).append(row.name)
        table = [{"count": len(names), **dict(fields)} for fields, names in alike.items()]
        for entry, names in zip(table, alike.values(), strict=True):
            if "note" in entry and (layers := _layers(names)):
                entry["layers"] = layers
        return table

    def summary(self) -> dict[str, Any]:
        """A JSON-ready object with everything that a record keeps."""
        return {
            "scheme": self.scheme,
            "share_by_bits": {str(bits): share for bits, share in self.share_by_bits.items()},
            "average_storage_bits": self.average_storage_bits,
            "weights_bytes": self.weights_bytes,
            "num_swapped": sum(row.action == "swapped" for row in self.rows),
            "num_skipped": sum(row.action == "skipped" for row in self.rows),
            "kernels": dict(sorted(Counter(row.kernel for row in self.rows if row.kernel).items())),
            "table": self.table(),
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    def _decoder_weights(self) -> list[Change]:
        return [row for row in self.rows if row.in_decoder and row.num_weights]


def places(names: Iterable[str]) -> str:
    """Where linears are, for people: `layers 0, 3-7: mlp.down_proj, mlp.up_proj; layer 9: self_attn.q_proj`."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(_NUMBER.sub("*", name, count=1), []).append(name)
    by_layers: dict[str, list[str]] = {}
    for kind, members in by_kind.items():
        by_layers.setdefault(_layers(members), []).append(kind.rpartition("*.")[2])
    return "; ".join(
        f"{_counted(layers)}{', '.join(dict.fromkeys(kinds))}" for layers, kinds in by_layers.items()
    )


def _counted(layers: str) -> str:
    if not layers:
        return ""
    return f"layer {layers}: " if layers.isdigit() else f"layers {layers}: "


def _layers(names: Iterable[str]) -> str:
    """Numbers of the layers that these names are of, rising, runs joined: `0, 3-7`; empty outside layers."""
    runs: list[tuple[int, int]] = []
    for number in sorted({int(found[0]) for name in names if (found := _NUMBER.search(name))}):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)

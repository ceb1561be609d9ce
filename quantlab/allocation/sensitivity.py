"""Sensitivity: how far the model's outputs move when one linear is quantized at one width and all else is 16-bit.

The divergence is the mean over the tokens of a text of KL(p_16bit || p_quantized) of next-token distributions, with
weights rounded to nearest. It is measured sequence by sequence and module by module, kept after each module, and never
measured twice for one checkpoint, text and code.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probes.sites import decoder_layers
from quantlab.allocation.divergence import Reference
from quantlab.allocation.tails import Tails, swapped
from quantlab.allocation.units import Unit
from quantlab.errors import EvaluationError, RecordError
from quantlab.layers.linear import QuantLinear, weight_of
from quantlab.methods import rtn
from quantlab.records import fingerprint, plain, write_atomic
from quantlab.schemes import Scheme, TensorSpec

__all__ = ["Sensitivities", "measure"]

Advance = Callable[[int], object]

_Table = dict[str, dict[str, list[float]]]
"""Linear -> width -> divergence on each sequence that was measured."""


@dataclass(frozen=True)
class Sensitivities:
    """What was measured, in a file of its own: named by the hash of what made it, written after every module."""

    path: Path
    made_by: Mapping[str, Any]
    table: _Table

    @classmethod
    def open(cls, folder: Path, made_by: Mapping[str, Any]) -> "Sensitivities":
        """Those that the folder keeps of these inputs, or none yet.

        Raises:
            RecordError: the file is not as it was written, or of other inputs.
        """
        made_by = plain(made_by)
        path = folder / f"{fingerprint(made_by)}.json"
        table = _read(path, made_by) if path.exists() else {}
        return cls(path, made_by, table)

    def of(self, name: str, width: str) -> float:
        """Mean divergence of one linear at one width, in nats a token; 0 at 16 bits."""
        values = self.table[name][width] if width != "w16" else [0.0]
        return math.fsum(values) / len(values)

    def count(self, name: str, width: str) -> int:
        """Sequences on which it is known."""
        return len(self.table.get(name, {}).get(width, ()))

    def add(self, name: str, found: Mapping[str, float]) -> None:
        """Keep the divergences of a linear on the next sequence."""
        for width, value in found.items():
            self.table.setdefault(name, {}).setdefault(width, []).append(value)
        body = {"made_by": self.made_by, "divergences": self.table}
        write_atomic(self.path, (json.dumps(body, sort_keys=True, allow_nan=False) + "\n").encode())


def measure(
    model: nn.Module,
    units: Sequence[Unit],
    widths: Sequence[str],
    ids_NT: Tensor,
    known: Sensitivities,
    *,
    scale_dtype: torch.dtype,
    advance: Advance = lambda count: None,
) -> int:
    """Measure what is not known yet, and keep it; returns how many divergences were measured.

    Args:
        model: a causal LM in eval mode; the same again afterwards.
        ids_NT: token ids, sequences of one length, on the model's device.
        advance: told how many divergences were measured or found, as they are.

    Raises:
        EvaluationError: a divergence that is not finite.
        SchemeError: a weight that is not finite, or a scale that overflows `scale_dtype`.
    """
    layer_of = _layers_of(model, units)
    measured = 0
    for place, ids_T in enumerate(ids_NT):
        missing = [(unit, _missing(unit, widths, known, place)) for unit in units]
        advance(sum(len(widths) - len(some) for _, some in missing))
        if not any(some for _, some in missing):
            continue
        tails = Tails(model, ids_T)
        reference = Reference(tails.clean_TV)
        for unit, some in missing:
            if some:
                found = _of_unit(tails, reference, unit, layer_of[unit.name], some, scale_dtype)
                known.add(unit.name, found)
                measured += len(found)
                advance(len(found))
    return measured


def _missing(unit: Unit, widths: Sequence[str], known: Sensitivities, place: int) -> list[str]:
    """Widths at which a unit is not known on the sequence at this place."""
    return [width for width in widths if width != "w16" and known.count(unit.name, width) <= place]


def _of_unit(
    tails: Tails,
    reference: Reference,
    unit: Unit,
    layer: int,
    widths: Sequence[str],
    scale_dtype: torch.dtype,
) -> dict[str, float]:
    """Divergence of one unit at each width, on one sequence."""
    linear = tails.model.get_submodule(unit.name)
    specs = [weights for width in widths if isinstance(weights := Scheme.parse(width).weights, TensorSpec)]
    solved = rtn.quantize_weights(weight_of(linear), specs, scale_dtype=scale_dtype)
    found = {}
    for width, each in zip(widths, solved, strict=True):
        quantized = QuantLinear(linear, each.quantized, None, "weight_only", unit.name)
        with swapped(tails.model, linear, quantized.eval()):
            found[width] = reference.divergence(tails.logits(layer))
        if not math.isfinite(found[width]):
            raise EvaluationError(
                f"a divergence must be finite: {unit.name} at {width} gives {found[width]}. The activations overflow; "
                "use dtype=float32."
            )
    return found


def _layers_of(model: nn.Module, units: Sequence[Unit]) -> dict[str, int]:
    """Position of the first decoder layer that each unit is in."""
    prefixes = [f"{name}." for name, _ in decoder_layers(model)]
    return {
        unit.name: min(
            index for index, prefix in enumerate(prefixes) if any(n.startswith(prefix) for n in unit.names)
        )
        for unit in units
    }


def _read(path: Path, made_by: Mapping[str, Any]) -> _Table:
    """The table of a file, checked."""
    try:
        body = json.loads(path.read_bytes())
        table: _Table = body["divergences"]
        values = [value for row in table.values() for column in row.values() for value in column]
        intact = body["made_by"] == made_by and all(
            isinstance(value, float) and math.isfinite(value) for value in values
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path) from error
    if not intact:
        raise _damaged(path)
    return table


def _damaged(path: Path) -> RecordError:
    return RecordError(
        f"kept divergences must be as they were written, and of these inputs: {path} is not. "
        "Delete it to measure again."
    )

"""What a folder of low-bit weights says of itself besides its codes: the scheme, and what it fixed beforehand.

In quantlab's own format that stands in config.json, in folders of other formats in the recipe that quantlab wrote
beside it; a folder without either is its weights alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from quantlab.errors import CheckpointError, SchemeError
from quantlab.inspection.checkpoint import is_of
from quantlab.inspection.compressed import CACHE_SCALES, carried_scheme, source_of_quantized
from quantlab.inspection.folder import read_object
from quantlab.methods.solved import Quantized
from quantlab.models.low_bit.codes import DecodedTensor, as_tensor, grid_of
from quantlab.models.stored_names import StoredNames
from quantlab.reading import quantlab_format
from quantlab.reading.quantlab_format import LEAVES, Entry
from quantlab.reading.raw import RawFolder
from quantlab.reading.readers import decoder_of
from quantlab.schemes import Scheme, TensorSpec, WeightFormat

__all__ = ["Carried", "read_carried"]


@dataclass(frozen=True)
class Carried:
    """One folder's linears and scheme."""

    raw: RawFolder
    method: str
    """What config.json calls the format."""
    scheme: Scheme | None
    """None for a folder that holds weights and says no more."""
    linears: Mapping[str, str | None]
    """Every linear that is not an ordinary one -> the linear whose codes it has; None where it keeps floats. Like all
    that a folder says, it speaks of linears by their stored names (`quantlab.models.stored_names`)."""
    entries: Mapping[str, Entry] = field(default_factory=dict)
    """In quantlab's own format."""

    def names(self, model: PreTrainedModel) -> StoredNames:
        """Where transformers puts what the folder holds."""
        own = self.own
        kept = [name for name in self.raw.tensors if name not in own]
        return StoredNames.of_files(model, [*kept, *(f"{name}.weight" for name in self.linears)])

    @property
    def own(self) -> frozenset[str]:
        """Tensors that stand for weights in low bits, or beside them."""
        low = {name for name, owner in self.linears.items() if owner is not None}
        found = {f"{name}.{leaf}" for name in self.entries for leaf in LEAVES}
        if self.method != "quantlab":
            found |= {name for name in self.raw.tensors if is_of(name, low) and not name.endswith(".bias")}
        if self.method == "compressed-tensors" and self.scheme is not None and self.scheme.cache is not None:
            found |= {name for name in self.raw.tensors if name.endswith(CACHE_SCALES)}
        return frozenset(found)

    def weights_of(
        self, name: str, quantized: Quantized | DecodedTensor | None
    ) -> TensorSpec | WeightFormat | None:
        """The grid of one linear, which decides on its kernel.

        Raises:
            CheckpointError: an entry that names none.
        """
        if quantized is None:
            return None
        owner = self.linears[name]
        if owner is not None and owner in self.entries:
            return _weights(self.entries[owner].body.get("weights"), owner, self.raw)
        return self.scheme.weights if self.scheme is not None else grid_of(quantized)

    def inputs_of(self, name: str) -> TensorSpec | None:
        """How the inputs of one linear are rounded."""
        skipped = name in self.entries and self.entries[name].body.get("skipped") is True
        return None if self.scheme is None or skipped else self.scheme.activations

    def storage_bits(self, name: str) -> int:
        """Bits on disk of a linear's weight; 16 each where it keeps floats, none where another linear holds them."""
        if self.linears[name] != name:
            return 16 * prod(self.entries[name].shape) if self.linears[name] is None else 0
        own = (self.raw.tensors[each] for each in self._low if each.startswith(f"{name}."))
        return 8 * sum(tensor.end - tensor.begin for tensor in own)

    @cached_property
    def _low(self) -> frozenset[str]:
        return self.own & self.raw.tensors.keys()

    def corrected_bias(self, name: str) -> Tensor | None:
        """What stands for a linear's bias, where the scheme corrects biases."""
        entry = self.entries.get(name)
        if entry is None or entry.body.get("corrected_bias") is not True:
            return None
        return as_tensor(self.raw.floats(f"{name}.corrected_bias", (entry.shape[0],)))

    def rotation(self, name: str) -> list[Tensor] | None:
        """The factors of the rotation of a linear's inputs."""
        entry = self.entries.get(name)
        if entry is None or entry.body.get("rotated") is not True:
            return None
        return self.rotation_of(entry.shape[1])

    def rotation_of(self, size: int) -> list[Tensor]:
        """The factors of the rotation of a size."""
        factors = quantlab_format.rotation(self.raw.quantization, size, str(self.raw.path))
        return [as_tensor(factor) for factor in factors]

    @property
    def turned_heads(self) -> int | None:
        """Channels of queries and keys that are turned after rotary positions; None where they are not."""
        width = self.raw.quantization.get("turned_heads") if self.entries else None
        if width is not None and (type(width) is not int or not 0 < width < 2**20):
            raise CheckpointError(
                f"turned_heads must be the channels of a head: that of {self.raw.path} is {str(width)[:40]}."
            )
        return width


def read_carried(raw: RawFolder) -> Carried:
    """What a folder carries.

    Raises:
        CheckpointError: a format that is not read here, or what it says of itself is no scheme.
    """
    method = str(raw.quantization.get("quant_method", "quanto"))
    decoder = decoder_of(raw)
    if method != "quantlab":
        names, scheme = decoder.linears(raw), _recipe_scheme(raw)
        if scheme is None and method == "compressed-tensors":
            source_of_quantized(raw.quantization, raw.path)  # refuses what it says beyond weights
        return Carried(raw, method, scheme, dict(zip(names, names, strict=True)))
    entries = quantlab_format.described(raw)
    owners = {name: _owner(entry) for name, entry in entries.items()}
    return Carried(raw, method, carried_scheme(raw.quantization, raw.path), owners, entries)


def _owner(entry: Entry) -> str | None:
    if entry.kind == "same":
        return str(entry.body["as"])
    return entry.name if entry.holds_codes else None


def _weights(name: Any, linear: str, raw: RawFolder) -> TensorSpec | WeightFormat:
    try:
        weights = Scheme.parse(name).weights if isinstance(name, str) and len(name) <= 40 else None
    except SchemeError:
        weights = None
    if weights is None:
        raise CheckpointError(
            f"a linear in low bits must name the scheme of its weights: {linear} of {raw.path} has {str(name)[:40]!r}."
        )
    return weights


def _recipe_scheme(raw: RawFolder) -> Scheme | None:
    """The scheme of recipe.json."""
    file = raw.path / "recipe.json"
    if not file.exists():
        return None
    name = read_object(file).get("scheme")
    try:
        if isinstance(name, str) and len(name) <= 200:
            return Scheme.parse(name)
    except SchemeError:
        pass
    raise CheckpointError(f"recipe.json must name a scheme: {file} has {str(name)[:80]!r}. Export again.")

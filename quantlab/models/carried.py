"""What a folder of low-bit weights says of itself besides its codes: the scheme, and what it fixed beforehand.

In quantlab's own format that stands in config.json, in folders of other formats in the recipe that quantlab wrote
beside it; a folder without either is its weights alone. O outputs, I inputs, H heads, C channels of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantlab.calibration.statistics import AttentionStats, Ranges
from quantlab.errors import CheckpointError, SchemeError
from quantlab.inspection.checkpoint import is_of
from quantlab.inspection.compressed import CACHE_SCALES, carried_scheme, source_of_quantized
from quantlab.inspection.folder import read_object
from quantlab.methods.solved import Quantized
from quantlab.numerics.affine import QuantizedTensor
from quantlab.numerics.codebook import CodebookTensor
from quantlab.numerics.qtype import QType
from quantlab.numerics.static import Fixed
from quantlab.reading import quantlab_format
from quantlab.reading.decoded import Decoded
from quantlab.reading.quantlab_format import LEAVES, Entry
from quantlab.reading.raw import RawFolder
from quantlab.reading.readers import decoder_of
from quantlab.schemes import Scheme, TensorSpec, WeightFormat

__all__ = ["Carried", "DecodedTensor", "as_quantized", "read_carried"]


@dataclass(frozen=True)
class DecodedTensor:
    """A matrix with a minimum in each group, as GGUF has them: `real` of what was decoded, on torch's side."""

    decoded: Decoded

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.decoded.bits

    def dequantize(self) -> Tensor:
        """The real matrix [O, I], float32."""
        return torch.from_numpy(self.decoded.real())


@dataclass(frozen=True)
class Carried:
    """One folder's linears and scheme."""

    raw: RawFolder
    method: str
    """What config.json calls the format."""
    scheme: Scheme | None
    """None for a folder that holds weights and says no more."""
    linears: Mapping[str, str | None]
    """Every linear that is not an ordinary one -> the linear whose codes it has; None where it keeps floats."""
    entries: Mapping[str, Entry] = field(default_factory=dict)
    """In quantlab's own format."""

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
        return self.scheme.weights if self.scheme is not None else _spec_of(quantized)

    def inputs_of(self, name: str) -> TensorSpec | None:
        """How the inputs of one linear are rounded."""
        skipped = name in self.entries and self.entries[name].body.get("skipped") is True
        return None if self.scheme is None or skipped else self.scheme.activations

    def fixed_inputs(self, name: str) -> Fixed | None:
        """The range of a linear's inputs under a static spec.

        Raises:
            CheckpointError: there is none, or it is not one.
        """
        inputs = self.inputs_of(name)
        if inputs is None or not inputs.static:
            return None
        width = self.entries[name].shape[1] if name in self.entries else 1
        places = 1 if inputs.granularity == "tensor" else width
        low, high = (self.raw.floats(f"{name}.input_{end}", (1, places)) for end in ("low", "high"))
        return _range(low, high, f"inputs of {name}", self.raw)

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
        return _torch(self.raw.floats(f"{name}.corrected_bias", (entry.shape[0],)))

    def rotation(self, name: str) -> list[Tensor] | None:
        """The factors of the rotation of a linear's inputs."""
        entry = self.entries.get(name)
        if entry is None or entry.body.get("rotated") is not True:
            return None
        return self.rotation_of(entry.shape[1])

    def rotation_of(self, size: int) -> list[Tensor]:
        """The factors of the rotation of a size."""
        factors = quantlab_format.rotation(self.raw.quantization, size, str(self.raw.path))
        return [_torch(factor) for factor in factors]

    @property
    def turned_heads(self) -> int | None:
        """Channels of queries and keys that are turned after rotary positions; None where they are not."""
        width = self.raw.quantization.get("turned_heads") if self.entries else None
        if width is not None and (type(width) is not int or not 0 < width < 2**20):
            raise CheckpointError(
                f"turned_heads must be the channels of a head: that of {self.raw.path} is {str(width)[:40]}."
            )
        return width

    def attention(self, layers: list[str]) -> dict[str, AttentionStats]:
        """The fixed ranges of each layer's queries, keys and values, as calibration gave them."""
        assert self.scheme is not None
        sites = {
            name for site, spec in self.scheme.head_sites.items() if spec.static for name in _sites(site)
        }
        return {layer: self._of_layer(layer, sites) for layer in layers} if sites else {}

    def _of_layer(self, layer: str, sites: set[str]) -> AttentionStats:
        if self.method == "compressed-tensors":
            return self._of_cache(layer)
        nothing = Ranges(torch.zeros(1, 1), torch.zeros(1, 1))
        found = {"attn_query": nothing, "attn_key": nothing, "attn_value": nothing}
        for site in sites:
            known: Any = self.raw.quantization.get("attention")
            for key in (layer, site):
                known = known.get(key) if isinstance(known, dict) else None
            if not isinstance(known, list) or len(known) != 2:
                raise CheckpointError(
                    f"static ranges must be stored: config.json of {self.raw.path} has none of {site} of {layer}."
                )
            ends = [
                quantlab_format.array(each, f"attention of {layer}", str(self.raw.path)) for each in known
            ]
            if ends[0].ndim != 2 or ends[0].shape != ends[1].shape:
                raise CheckpointError(
                    f"static ranges must be of heads and channels: {site} of {layer} in {self.raw.path} is not."
                )
            found[site] = Ranges(*_range(ends[0], ends[1], f"{site} of {layer}", self.raw))
        return AttentionStats(found["attn_query"], found["attn_key"], found["attn_value"])

    def _of_cache(self, layer: str) -> AttentionStats:
        """A layer's ranges from the scales of its cache: what 127 steps span."""
        found = {}
        for kind in ("k", "v"):
            end = 127 * self.raw.floats(f"{layer}.{kind}_scale", (1,)).reshape(1, 1)
            found[kind] = Ranges(*_range(-end, end, f"{kind}_scale of {layer}", self.raw))
        return AttentionStats(found["k"], found["k"], found["v"])


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


def as_quantized(decoded: Decoded) -> Quantized | DecodedTensor:
    """Decoded codes as kernels take them."""
    codes, scale = _torch(decoded.codes_OI), _torch(decoded.scale_OG)
    if decoded.table is not None:
        return CodebookTensor(codes, scale, _torch(decoded.table), decoded.bits, scale_bits=32)
    if decoded.offset_OG is not None:
        return DecodedTensor(decoded)
    if decoded.zero_OG is None:
        # uint8 wraps around: read as int8, code - 2^(b-1) is itself.
        signed = (codes - 2 ** (decoded.bits - 1)).view(torch.int8)
        return QuantizedTensor(signed, scale, None, QType(decoded.bits, full_range=True))
    zero = _torch(decoded.zero_OG)
    whole = bool((zero == zero.round()).all())
    return QuantizedTensor(codes, scale, zero.int() if whole else zero, QType(decoded.bits, symmetric=False))


def _torch(array: NDArray[Any]) -> Tensor:
    """The same values in memory that may be written, as torch asks."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _owner(entry: Entry) -> str | None:
    if entry.kind == "same":
        return str(entry.body["as"])
    return entry.name if entry.holds_codes else None


def _sites(site: str) -> tuple[str, ...]:
    return ("attn_key", "attn_value") if site == "kv_cache" else (site,)


def _range(low: Any, high: Any, what: str, raw: RawFolder) -> Fixed:
    ends = _torch(low), _torch(high)
    if not bool((ends[0].isfinite() & ends[1].isfinite() & (ends[0] <= ends[1])).all()):
        raise CheckpointError(
            f"a static range must be finite and in order: that of {what} in {raw.path} is not."
        )
    return ends


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


def _spec_of(quantized: Quantized | DecodedTensor) -> TensorSpec | WeightFormat:
    """The grid of codes that no recipe speaks of."""
    if not isinstance(quantized, QuantizedTensor):
        return WeightFormat("table", quantized.bits)
    rows, groups = quantized.scale.shape
    symmetric, bits = quantized.qtype.symmetric, quantized.qtype.bits
    if groups == 1:
        return TensorSpec(bits, "channel" if rows > 1 else "tensor", symmetric=symmetric)
    return TensorSpec(bits, "group", quantized.codes.shape[1] // groups, symmetric)


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

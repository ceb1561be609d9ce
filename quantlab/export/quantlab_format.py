"""quantlab's own format: codes of any scheme, of any architecture. Version 1.

Letters: O outputs, I inputs, b bits of a code, G scales in a row, S blocks in a row, H heads, C channels of a head.

A packed matrix of codes [R, N] is uint8 [R, ceil(N * b / 8)]: row r is one stream of bits that begins with a byte.
Code c(r, n), an unsigned number, is bits n * b .. n * b + b - 1 of the row, lowest bit first; bit k of the row is bit
k % 8 of its byte k // 8. Nothing lies between codes, and unused bits of the last byte are 0.

`quantization_config` of config.json says what each linear is, under its name in the model (`linears`):

    kind             affine, table, block, float or same
    shape            [O, I], of the matrix that inputs are multiplied by: y = x W^T
    transposed       true where the architecture keeps the matrix as [I, O] (GPT-2's Conv1D)
    weights          the scheme of this linear's weights by itself: w4g32z
    bits             b, 2 to 8                                                                 (affine, table, block)
    scale            [O, G], [O, 1] or [1, 1]: the shape of its scales; G divides I            (affine, table, block)

and these tensors stand for its `weight`, each named `LINEAR.` and:

    affine           codes          uint8, packed [O, I] at b bits
                     scale          float32, float16 or bfloat16, of the shape said
                     zero_point     nothing where the entry has no `zero_point`: it is 2^(b-1) then;
                                    "whole": uint8, packed at b bits, of the shape of the scales;
                                    "real": floats of the shape of the scales
                     weight = (code - zero_point) * scale
    table            codes          as above
                     scale          by `scale_type`: "float": floats of the shape said;
                                    "e8m0": uint8 n, for 2^(n - 127);
                                    "e4m3": uint8, codes of the 8-bit float E4M3, and
                     matrix_scale   float32 [1], which each of those is multiplied by
                     weight = tables[entry.table][code] * scale
    block            codes          as above
                     d              float16 [O, S]
                     dmin           float16 [O, S]; Q4_1, Q5_1, Q4_K, Q5_K only
                     sub_scales     s: packed [O, G], of K types: 6 bits, 8 in Q6_K; less 32 in Q3_K, less 128 in Q6_K
                     sub_mins       m: packed [O, G] at 6 bits; Q4_K and Q5_K only
                     `block` names ggml's type; scale = d * s, or d where there is no s
                     weight = code * scale + dmin          Q4_1, Q5_1
                              code * scale - dmin * m      Q4_K, Q5_K
                              (code - 2^(b-1)) * scale     the others
    float            weight         as the architecture has it, for a linear that needs one of the following
    same             nothing: its codes are those of the linear named by `as`

Everything is computed in float32, each operation rounded by itself, in the order written. Of a linear there may be too:

    rotated          true: inputs are multiplied by the rotation of size I before anything else
    skipped          true: the scheme does not round its inputs
    corrected_bias   floats [O], in the place of `bias`, where the entry says true
    input_low, input_high    float32 [1, 1] or [1, I]: the fixed range of its inputs, where `inputs` is "static"

and beside `linears`:

    quant_method, version    "quantlab", 1
    scheme           the canonical name of the whole scheme; what inputs and attention are rounded to stands in it
    tables           name -> values of codes, [2^b]
    rotations        size -> orthogonal factors whose Kronecker product, in that order, has the size
    turned_heads     the size of the rotation that queries and keys get after rotary positions, where they get one
    attention        layer -> attn_query, attn_key, attn_value -> [low, high]: fixed ranges, [1, 1], [H, 1] or [H, C]

Numbers of the last four are float32 as {"shape": [..], "float32": hexadecimal bytes, little-endian, in C order}. Every
other tensor is a weight of the architecture under its own name. Scales are rounded to the stored dtype before the codes
are chosen. `docs/quantlab-format.md` holds the same, with a reader of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probes.sites import attention_layers
from quantlab.errors import SchemeError
from quantlab.export.codes import unsigned_codes
from quantlab.export.job import ExportJob
from quantlab.export.shards import Layout, Part, TensorType
from quantlab.export.tensors import exactly, holds
from quantlab.layers.linear import weight_of
from quantlab.layers.rotated import HadamardTransform, RotatedLinear
from quantlab.methods.k_quants import FALLBACKS, SUPERBLOCK
from quantlab.methods.llm_int8 import INT8
from quantlab.methods.solved import Quantized, Solved
from quantlab.numerics.affine import QuantizedTensor
from quantlab.numerics.block import BLOCK_TYPES, BlockTensor
from quantlab.numerics.codebook import CodebookTensor
from quantlab.numerics.packing import pack
from quantlab.numerics.static import static_range
from quantlab.numerics.tables import FLOATS, FP4, NF4
from quantlab.schemes import Scheme, TensorSpec, WeightFormat
from quantlab.transforms.hadamard import factors_of

__all__ = ["VERSION", "layout"]

VERSION = 1
"""Of the format."""

TABLES: dict[str, Tensor] = {
    "nf4": NF4,
    "fp4": FP4,
    "nf4_dq": NF4,
    "fp4_dq": FP4,
    "fp8": FLOATS["e4m3"].values(),
    "fp8e5m2": FLOATS["e5m2"].values(),
    "mxfp4": FLOATS["e2m1"].values(),
    "mxfp6": FLOATS["e2m3"].values(),
    "mxfp6e3m2": FLOATS["e3m2"].values(),
    "nvfp4": FLOATS["e2m1"].values(),
    "llm_int8": INT8,
}
"""Format of weights -> what its codes stand for."""
_SCALE_TYPES = {"mxfp4": "e8m0", "mxfp6": "e8m0", "mxfp6e3m2": "e8m0", "nvfp4": "e4m3"}
"""Format of weights -> how its scales are stored, where they are no plain floats."""
_IN_STORED_DTYPE = ("fp8", "fp8e5m2")
"""Formats whose scales are rounded to the stored dtype; those of the others are float32."""
SUB_SCALES = {"Q6_K": (8, 128), "Q5_K": (6, 0), "Q4_K": (6, 0), "Q3_K": (6, 32)}
"""K type -> bits of a sub-scale, and what is added to it before it is packed."""

Tensors = dict[str, TensorType]
Build = Callable[[Quantized], dict[str, Tensor]]


class _Plan(NamedTuple):
    """How one matrix is stored: its entry in config.json, its tensors, and what makes them of codes."""

    entry: dict[str, Any]
    tensors: Tensors
    build: Build


def layout(job: ExportJob) -> Layout:
    """How the linears of the job are stored."""
    parts: dict[str, Part] = {}
    entries: dict[str, dict[str, Any]] = {}
    owners: dict[int, str] = {}
    for name in job.linears:
        linear = job.model.get_submodule(name)
        owner = owners.setdefault(id(linear.weight), name)
        parts[name], entries[name] = _linear(job, name, linear, owner)
    for name, module in job.model.named_modules():
        if isinstance(module, RotatedLinear) and name not in entries:
            entries[name] = {"kind": "float", "skipped": True, "rotated": True} | _shape(module)
    config = {"quant_method": "quantlab", "version": VERSION, "scheme": job.scheme.name, "linears": entries}
    return Layout(
        linears=parts,
        quantization_config=config | _beside(job, entries),
        name=f"quantlab-{VERSION}",
        num_codes=sum(weight_of(job.model.get_submodule(name)).numel() for name in owners.values()),
    )


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [R, N] as rows of bits: uint8 [R, ceil(N * bits / 8)].

    Eight codes are exactly `bits` bytes: padded to that, all rows are one stream, and every row begins with a byte.
    """
    rows, width = codes.shape
    stream = pack(nn.functional.pad(codes, (0, -width % 8)), bits).view(rows, -1)
    return stream[:, : ceil(width * bits / 8)].contiguous()


def array(values: Tensor) -> dict[str, Any]:
    """Numbers as config.json holds them: float32, bit for bit."""
    exact = values.detach().float().cpu().contiguous()
    return {"shape": list(exact.shape), "float32": exact.numpy().astype("<f4").tobytes().hex()}


def _shape(linear: nn.Module) -> dict[str, Any]:
    """What every entry holds."""
    shape = {"shape": list(weight_of(linear).shape)}
    return shape | ({"transposed": True} if isinstance(linear, Conv1D) else {})


def _linear(job: ExportJob, name: str, linear: nn.Module, owner: str) -> tuple[Part, dict[str, Any]]:
    """One linear's tensors, made when the part is built, and its entry."""
    weights = job.ready.weights_of(name)
    plan = _plan(job, linear, weights)
    if owner != name:
        plan = _Plan({"kind": "same", "as": owner}, {}, _nothing)
    entry, tensors = plan.entry | _shape(linear), dict(plan.tensors)
    others = _fixed_inputs(job, name)
    tensors |= {leaf: TensorType(tensor.dtype, tuple(tensor.shape)) for leaf, tensor in others.items()}
    if others:
        entry["inputs"] = "static"
    if isinstance(linear, RotatedLinear):
        entry["rotated"] = True
    corrects = weights is not None and "bias" in job.scheme.transforms
    if corrects:
        _check_own(name, owner)
        entry["corrected_bias"] = True
        tensors["corrected_bias"] = TensorType(weight_of(linear).dtype, (weight_of(linear).shape[0],))

    def build() -> dict[str, Tensor]:
        made = dict(others)
        if weights is None:
            kept = linear.weight
            assert isinstance(kept, Tensor)
            made |= {leaf: exactly(kept, each.dtype) for leaf, each in plan.tensors.items()}
        elif owner == name:
            quantized = job.codes(name)
            made |= {leaf: tensor.cpu() for leaf, tensor in plan.build(quantized).items()}
            if corrects:
                bias = job.ready.bias(name, Solved(quantized))
                assert bias is not None
                made["corrected_bias"] = bias.cpu()
        return made

    return Part(tensors, build, num_linears=1), entry


def _check_own(name: str, owner: str) -> None:
    if owner != name:
        raise SchemeError(
            f"a corrected bias goes with a matrix of its own: {name} shares that of {owner}. Leave bias out."
        )


def _nothing(quantized: Quantized) -> dict[str, Tensor]:
    return {}


def _plan(job: ExportJob, linear: nn.Module, weights: TensorSpec | WeightFormat | None) -> _Plan:
    """How a matrix under this spec is stored."""
    shape = tuple(weight_of(linear).shape)
    if weights is None:
        kept = linear.weight
        assert isinstance(kept, Tensor)
        kind = TensorType(job.dtype if holds(job.dtype, kept) else kept.dtype, tuple(kept.shape))
        return _Plan({"kind": "float"}, {"weight": kind}, _nothing)
    entry = {"weights": Scheme(weights).name}
    if isinstance(weights, TensorSpec):
        plan = _affine(shape, weights, job.dtype, real=job.scheme.method == "hqq")
    elif weights.name in TABLES:
        plan = _table(shape, weights, job.dtype)
    elif weights.name.upper() in BLOCK_TYPES:
        plan = _block(shape, weights)
    else:
        raise SchemeError(
            f"format quantlab has no layout for weights in {weights.name}. Use another scheme of weights."
        )
    return plan._replace(entry=plan.entry | entry)


def _packed(rows: int, width: int, bits: int) -> TensorType:
    return TensorType(torch.uint8, (rows, ceil(width * bits / 8)))


def _affine(shape: tuple[int, ...], spec: TensorSpec, dtype: torch.dtype, *, real: bool) -> _Plan:
    (rows, width), bits = shape, spec.bits
    scales = (1, 1) if spec.granularity == "tensor" else (rows, width // (spec.group_size or width))
    entry: dict[str, Any] = {"kind": "affine", "bits": bits, "scale": list(scales)}
    tensors = {"codes": _packed(rows, width, bits), "scale": TensorType(dtype, scales)}
    if not spec.symmetric:
        entry["zero_point"] = "real" if real else "whole"
        tensors["zero_point"] = TensorType(dtype, scales) if real else _packed(*scales, bits)

    def build(quantized: Quantized) -> dict[str, Tensor]:
        assert isinstance(quantized, QuantizedTensor)
        made = {"codes": pack_rows(unsigned_codes(quantized), bits)}
        made["scale"] = exactly(quantized.scale, dtype)
        if quantized.zero_point is not None:
            zero = quantized.zero_point
            made["zero_point"] = exactly(zero, dtype) if real else pack_rows(zero.to(torch.uint8), bits)
        return made

    return _Plan(entry, tensors, build)


def _table(shape: tuple[int, ...], form: WeightFormat, dtype: torch.dtype) -> _Plan:
    rows, width = shape
    scales = (rows, width // (form.group_size or width))
    kind = _SCALE_TYPES.get(form.name, "float")
    stored = torch.uint8 if kind != "float" else dtype if form.name in _IN_STORED_DTYPE else torch.float32
    entry = {"kind": "table", "bits": form.bits, "scale": list(scales), "scale_type": kind}
    tensors = {"codes": _packed(rows, width, form.bits), "scale": TensorType(stored, scales)}
    if kind == "e4m3":
        tensors["matrix_scale"] = TensorType(torch.float32, (1,))

    def build(quantized: Quantized) -> dict[str, Tensor]:
        assert isinstance(quantized, CodebookTensor)
        ours = TABLES[form.name].to(quantized.values.device)
        assert torch.equal(quantized.values.nan_to_num(), ours.nan_to_num()), f"codes of {form.name}"
        made = {"codes": pack_rows(quantized.codes, form.bits)}
        if kind == "float":
            return made | {"scale": exactly(quantized.scale, stored)}
        if kind == "e8m0":
            return made | {"scale": _exponents(quantized.scale)}
        of_matrix, codes = _factored(quantized.scale)
        return made | {"scale": codes, "matrix_scale": of_matrix.view(1)}

    return _Plan(entry | {"table": form.name}, tensors, build)


def _block(shape: tuple[int, ...], form: WeightFormat) -> _Plan:
    (rows, width), kind = shape, form.name.upper()
    if width % SUPERBLOCK:
        kind = FALLBACKS.get(kind, kind)
    size = BLOCK_TYPES[kind]
    blocks = width // size.block_size
    groups = blocks * size.num_scales
    of_blocks = TensorType(torch.float16, (rows, blocks))
    entry = {"kind": "block", "bits": size.bits, "scale": [rows, groups], "block": kind}
    tensors = {"codes": _packed(rows, width, size.bits), "d": of_blocks}
    if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        tensors["dmin"] = of_blocks
    if kind in SUB_SCALES:
        tensors["sub_scales"] = _packed(rows, groups, SUB_SCALES[kind][0])
    if kind in ("Q4_K", "Q5_K"):
        tensors["sub_mins"] = _packed(rows, groups, 6)

    def build(quantized: Quantized) -> dict[str, Tensor]:
        assert isinstance(quantized, BlockTensor) and quantized.kind == kind
        made = {"codes": pack_rows(quantized.codes, size.bits), "d": quantized.d.contiguous()}
        if quantized.dmin is not None:
            made["dmin"] = quantized.dmin.contiguous()
        if quantized.sub_scales is not None:
            bits, shift = SUB_SCALES[kind]
            made["sub_scales"] = pack_rows((quantized.sub_scales + shift).to(torch.uint8), bits)
        if quantized.sub_mins is not None:
            made["sub_mins"] = pack_rows(quantized.sub_mins.to(torch.uint8), 6)
        return made

    return _Plan(entry, tensors, build)


def _exponents(scale: Tensor) -> Tensor:
    """n of 2^(n - 127), uint8."""
    exponent = torch.frexp(scale).exponent - 1 + 127
    assert torch.equal(torch.ldexp(torch.ones_like(scale), exponent - 127), scale), "scales are powers of two"
    return exponent.to(torch.uint8)


def _factored(scale: Tensor) -> tuple[Tensor, Tensor]:
    """(t, codes uint8): scale = e4m3 * t, rounded to float32, as NVFP4 makes it: the largest e4m3 is 448."""
    values = FLOATS["e4m3"].values()[:127].to(scale.device)
    near = scale.max() / values[-1]
    bits = near.view(torch.int32) + torch.arange(-3, 4, dtype=torch.int32, device=scale.device)
    # A matrix of zeros has the smallest t.
    for of_matrix in (*bits.view(torch.float32), torch.tensor(2.0**-126, device=scale.device)):
        products = values * of_matrix
        codes = torch.searchsorted(products, scale.contiguous()).clamp(max=126)
        if torch.equal(products[codes], scale):
            return of_matrix, codes.to(torch.uint8)
    raise AssertionError("scales of nvfp4 are products of an 8-bit float and one number")


def _fixed_inputs(job: ExportJob, name: str) -> dict[str, Tensor]:
    """The range of a linear's inputs under a static spec."""
    spec = job.scheme.activations
    if spec is None or not spec.static:
        return {}
    stats = job.ready.stats[name]
    low, high = static_range(spec, stats.minimum_I, stats.maximum_I)
    return {"input_low": low.cpu().contiguous(), "input_high": high.cpu().contiguous()}


def _beside(job: ExportJob, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What stands beside the linears: tables, rotations, and the fixed ranges of attention."""
    found: dict[str, Any] = {}
    if tables := sorted({entry["table"] for entry in entries.values() if "table" in entry}):
        found["tables"] = {name: array(TABLES[name]) for name in tables}
    rotations: dict[str, Sequence[Tensor]] = {}
    for name, entry in entries.items():
        if entry.get("rotated"):
            before = job.model.get_submodule(name).before
            assert isinstance(before, HadamardTransform)
            rotations[str(entry["shape"][1])] = before.factors
    if width := _turned_heads(job):
        rotations.setdefault(str(width), factors_of(width))
        found["turned_heads"] = width
    if rotations:
        found["rotations"] = {size: [array(each) for each in factors] for size, factors in rotations.items()}
    if any(spec.static for spec in job.scheme.head_sites.values()):
        found["attention"] = {layer: _ranges(job, layer) for layer, _ in attention_layers(job.model)}
    return found


def _turned_heads(job: ExportJob) -> int | None:
    """Channels of the heads whose queries and keys are rotated, as `layers.sites.turn_heads_` does it."""
    read = {"attn_query", "attn_key", "kv_cache"} & set(job.scheme.head_sites)
    if not read or not {"rotate", "spin"} & set(job.scheme.transforms):
        return None
    layer = attention_layers(job.model)[0][1]
    width = getattr(layer, "head_dim", None) or getattr(layer, "head_size", None)
    assert isinstance(width, int), f"{type(layer).__name__} says how wide its heads are"
    return width


def _ranges(job: ExportJob, layer: str) -> dict[str, list[dict[str, Any]]]:
    """The fixed ranges of one attention layer."""
    found = {}
    for site, spec in job.scheme.head_sites.items():
        names = ("attn_key", "attn_value") if site == "kv_cache" else (site,)
        for name in names if spec.static else ():
            seen = getattr(job.ready.attention[layer], name.removeprefix("attn_"))
            low, high = static_range(spec, seen.minimum_HC, seen.maximum_HC)
            found[name] = [array(low.squeeze(-2)), array(high.squeeze(-2))]
    return found

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

from quantlab.export.quantlab_format.writer import VERSION, layout

__all__ = ["VERSION", "layout"]

"""FORMATS: what a checkpoint can be written as, and which schemes and engines each format has. Needs no torch.

Adding a format is a line here, its refusal in `refusals`, what it asks of shapes in `linear_shapes`, its engines in
`engines`, and a module beside this one, which is imported only when something is written. The module offers

    layout(job: ExportJob) -> Layout                            where weights are safetensors
    write(job: ExportJob, folder: Path) -> Layout               where they are a file of their own (gguf)
    check(checkpoint: Checkpoint) -> None                       where it can tell at once what it cannot hold of a model
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantlab.errors import ConfigError, SchemeError, nearest
from quantlab.export import engines, linear_shapes, refusals
from quantlab.export.engines import Engine
from quantlab.schemes import Scheme

__all__ = ["FORMATS", "Format", "find_format"]


@dataclass(frozen=True)
class Format:
    """A way to store low-bit weights, and what it can hold."""

    name: str
    description: str
    """One line for `quantlab list formats`."""
    schemes: str
    """The schemes that it can express, as an error names them."""
    module: str
    """Where its writer is."""
    refusal: Callable[[Scheme], str | None]
    """What the format cannot hold of a scheme, or None when it holds all of it."""
    engines: Callable[[Scheme], tuple[Engine, ...]]
    """Who loads a scheme in this format, and how it runs there."""
    scale_dtype: str | None = None
    """Dtype of scales where the format fixes it, as torch names it; None: that of everything kept."""
    shapes: Callable[[Scheme, Mapping[str, tuple[int, int]]], None] = linear_shapes.any_shape
    """Refuses linears, by name and (out_features, in_features), whose features do not fit."""
    plain_linears: bool = True
    """Whether its readers load nn.Linear only, and none of the classes that compute the same."""
    own_weights: bool = True
    """Whether every linear needs a weight of its own, since readers could not tie it again."""

    def check(self, scheme: Scheme) -> None:
        """Refuse a scheme that the format cannot express.

        Raises:
            SchemeError: says what does not fit, and which schemes do.
        """
        reason = self.refusal(scheme)
        if reason is not None:
            raise SchemeError(
                f"format {self.name} cannot hold scheme {scheme.name}: {reason}. It holds {self.schemes}."
            )

    def check_shapes(self, scheme: Scheme, linears: Mapping[str, tuple[int, int]]) -> None:
        """Refuse linears whose features do not fit the format.

        Args:
            linears: name -> (out_features, in_features) of every linear that goes into low bits.

        Raises:
            SchemeError: names the first that does not fit.
        """
        self.shapes(scheme, linears)

    def holds_no(self, kind: str, name: str) -> SchemeError:
        """The error of a linear of a class that the format's readers do not load."""
        return SchemeError(
            f"format {self.name} holds nn.Linear only: {name} is a {kind}, which its readers do not load. "
            "Use --format quantlab, quantize another architecture, or only evaluate this one."
        )


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: no such format; the nearest known one is named.
    """
    if name not in FORMATS:
        hint = nearest(name.lower(), FORMATS) or f" Known formats: {', '.join(FORMATS)}."
        raise ConfigError(f"unknown format {name!r}.{hint}")
    return FORMATS[name]


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format(
            "compressed-tensors",
            "symmetric weights of 2 to 8 bits per channel or group, fp8, w8a8, kv8ts; for transformers and vLLM",
            "symmetric weights of 2 to 8 bits per channel or group (w4, w6g64-gptq, ...), fp8, w8a8; kv8ts too",
            "quantlab.export.compressed_tensors",
            refusals.of_compressed_tensors,
            engines.of_compressed_tensors,
        ),
        Format(
            "gptq",
            "weights of 2 to 8 bits per channel or group, zero points too; for gptqmodel, vLLM, auto-gptq",
            "weights of 2 to 8 bits per channel or group of 16 to 1024 (w4g64-gptq, w3g64z, w6, ...)",
            "quantlab.export.gptq",
            refusals.of_gptq,
            engines.of_gptq,
            "float16",
            linear_shapes.shape_of_gptq,
        ),
        Format(
            "awq",
            "weights of 4 bits in groups, the GEMM layout; for gptqmodel, transformers, vLLM",
            "weights of 4 bits in groups of 16 to 128 (w4g64z-awq, w4g64, ...)",
            "quantlab.export.awq",
            refusals.of_awq,
            engines.of_awq,
            "float16",
            linear_shapes.shape_of_awq,
        ),
        Format(
            "bitsandbytes",
            "nf4 and fp4, with double quantization too (nf4_dq), and int8 (llm_int8); for transformers",
            "nf4, fp4, nf4_dq, fp4_dq and llm_int8",
            "quantlab.export.bitsandbytes",
            refusals.of_bitsandbytes,
            engines.of_bitsandbytes,
        ),
        Format(
            "gguf",
            "ggml's blocks: q8_0, q6_k, q5_k, q5_0, q5_1, q4_k, q4_0, q4_1, q3_k, and F16 (w16); for llama.cpp",
            "q8_0, q6_k, q5_k, q5_0, q5_1, q4_k, q4_0, q4_1 and q3_k, and w16 as floats",
            "quantlab.export.gguf",
            refusals.of_gguf,
            engines.of_gguf,
            plain_linears=False,
        ),
        Format(
            "torchao",
            "weights of 2 to 8 bits per channel or group, a byte each, zero points too; for transformers and torchao",
            "weights of 2 to 8 bits per channel or group (w8, w4g64-gptq, w4g32z, ...)",
            "quantlab.export.torchao",
            refusals.of_torchao,
            engines.of_torchao,
        ),
        Format(
            "quanto",
            "weights of 8 bits per channel, and of 4 or 2 bits, zero points too; for optimum-quanto",
            "w8, and weights of 4 or 2 bits per channel (w4, w4z, ...) or in groups of quanto's own sizes (w4g128)",
            "quantlab.export.quanto",
            refusals.of_quanto,
            engines.of_quanto,
            shapes=linear_shapes.shape_of_quanto,
        ),
        Format(
            "quantlab",
            "any scheme that has low-bit weights, of any architecture, the differential ones too; for quantlab",
            "every scheme with low-bit weights",
            "quantlab.export.quantlab_format",
            refusals.of_quantlab,
            engines.of_quantlab,
            plain_linears=False,
            own_weights=False,
        ),
    )
}
"""Every format by its name."""

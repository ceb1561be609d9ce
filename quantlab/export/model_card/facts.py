"""What a card says besides scores."""

from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.export.engines import Engine
from quantlab.schemes import Scheme

__all__ = ["CardFacts"]

_SCALES = {
    **dict.fromkeys(("nf4", "fp4", "llm_int8"), "float32"),
    **dict.fromkeys(("nf4_dq", "fp4_dq"), "8 bits, with a float32 scale per 256 of them"),
    **dict.fromkeys(("mxfp4", "mxfp6", "mxfp6e3m2"), "powers of two in 8 bits"),
    "nvfp4": "8-bit floats, with one float32 for the matrix",
    **dict.fromkeys(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0"), "float16"),
    **dict.fromkeys(("q6_k", "q5_k", "q4_k", "q3_k"), "float16 and small integers, as the type has them"),
}
"""Format of weights -> how its scales are stored, where that is fixed and they are not rounded to the stored dtype."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides scores."""

    scheme: Scheme
    format_name: str
    layout: str
    base_model: str
    """Name of the checkpoint that was quantized."""
    content_hash: str
    source_precision: str
    """What the checkpoint's weights were: `bfloat16`, or `dequantized Q4_1`."""
    stored_dtype: str
    """Dtype of everything that keeps its precision, and of scales where `scale_dtype` is empty."""
    num_swapped: int
    skipped: Sequence[str]
    """Decoder linears that keep their precision because the user skipped them."""
    skip: Sequence[str]
    """The patterns that say so."""
    average_storage_bits: float
    weights_bytes: int
    tied_embeddings: bool
    engines: Sequence[Engine]
    """Who loads the folder, and how it runs there."""
    wider: Sequence[str] = ()
    """Tensors that the stored dtype would round, stored in their own."""
    notes: tuple[str, ...] = ()
    """What methods and transforms did otherwise than asked, or untied."""
    scale_dtype: str = ""
    """Dtype of scales where the format fixes another."""
    kept_in: str = ""
    """Types of everything that keeps its precision, where they are not the stored dtype."""

    @property
    def fixed_scales(self) -> str | None:
        """How scales are stored where the format of weights fixes that."""
        return _SCALES.get(self.scheme.format or "")

    @property
    def rounded_to(self) -> str:
        """Dtype that other scales are rounded to."""
        return self.scale_dtype or self.stored_dtype

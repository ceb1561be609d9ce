"""DECODERS: which module reads a folder's codes, by what its config.json says it is. No torch.

A module offers

    linears(raw) -> list[str]             names of the linears in low bits, as the model has them
    decode(raw, name) -> Decoded          codes and scales of one of them
"""

from importlib import import_module
from typing import Protocol, cast

from quantlab.errors import CheckpointError, nearest
from quantlab.reading.decoded import Decoded
from quantlab.reading.quanto import QMAP
from quantlab.reading.raw import RawFolder

__all__ = ["DECODERS", "Decoder", "decoder_of"]


class Decoder(Protocol):
    """A module of this package that reads one format."""

    def linears(self, raw: RawFolder) -> list[str]:
        """Names of the linears in low bits."""

    def decode(self, raw: RawFolder, name: str) -> Decoded:
        """Codes and scales of one of them."""


DECODERS = {
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptq",
    "awq": "awq",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "quanto",
    "quantlab": "quantlab_format",
}
"""`quant_method` of config.json -> module. GGUF files have no config.json; `quantlab.reading.gguf` reads them."""


def decoder_of(raw: RawFolder) -> Decoder:
    """The decoder of a folder.

    Raises:
        CheckpointError: neither its config.json nor a file beside it names a method that is read here.
    """
    # quanto's own folders say nothing in config.json.
    by_map = "quantization_config" not in raw.config and (raw.path / QMAP).is_file()
    method = "quanto" if by_map else str(raw.quantization.get("quant_method"))
    if method not in DECODERS:
        raise CheckpointError(
            f"low-bit weights must be in a format that is read here: {raw.path} is in {method!r}."
            f"{nearest(method, DECODERS)}"
        )
    return cast(Decoder, import_module(f"quantlab.reading.{DECODERS[method]}"))

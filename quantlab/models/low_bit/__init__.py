"""Folders of low-bit weights in memory, codes and all: the model that an export is compared with.

`load_low_bit` opens a folder of any safetensors format that `quantlab.reading` decodes. Its architecture comes from
config.json, of which transformers is not shown the quantization_config; what keeps its precision is loaded and checked
as an ordinary checkpoint (`floats`); every linear in low bits becomes a `QuantLinear` on the codes of the folder
(`linears`); the rest of the scheme is put on as `quantized` does (`sites`). So its logits are those of
`quantized(model, scheme)` bit for bit.
"""

from quantlab.models.low_bit.load import load_low_bit

__all__ = ["load_low_bit"]

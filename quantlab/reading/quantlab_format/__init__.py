"""quantlab's own format, decoded with numpy: the layout stands in `docs/quantlab-format.md`. No torch.

Whatever config.json says of a linear is checked (`entry`), and held against the stored tensors (`leaves`), before
memory is taken for it (`matrices`, `numbers`).
"""

from quantlab.reading.quantlab_format.entry import KINDS, Entry, entries, shapes
from quantlab.reading.quantlab_format.leaves import LEAVES, described, linears
from quantlab.reading.quantlab_format.matrices import decode
from quantlab.reading.quantlab_format.numbers import array, rotation

__all__ = [
    "KINDS",
    "LEAVES",
    "Entry",
    "array",
    "decode",
    "described",
    "entries",
    "linears",
    "rotation",
    "shapes",
]

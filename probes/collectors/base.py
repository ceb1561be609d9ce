"""What a collector is, and what all collectors of a pass share."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass
class Cursor:
    """Where the pass over the sequences is."""

    first_sequence: int = 0
    """Number of the batch's first sequence."""


class Collector(Protocol):
    """Watches modules and fills statistics."""

    names: list[str]
    """Dotted names of the modules that it watches."""

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Takes one call of one of them into the statistics."""

    def result(self) -> dict[str, Any]:
        """The finished statistics, JSON-ready; measures by name."""


def tensor_of(output: Any) -> Tensor:
    """The tensor of a module's output: itself, or the first of a tuple."""
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, Tensor)
    return tensor.detach()

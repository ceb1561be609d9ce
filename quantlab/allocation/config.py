"""What an allocation is asked for: checkpoint, budget, candidate widths, the text that measures. No torch."""

from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from quantlab.config import CheckpointConfig, TextConfig
from quantlab.errors import ConfigError
from quantlab.schemes import Scheme, width_name
from quantlab.sections import Section

__all__ = ["AllocationConfig", "SensitivityText"]


class SensitivityText(TextConfig):
    """The text on which outputs are compared: by default a held-out one that ships with quantlab."""

    path: str | None = "package://quantlab/checkpoints/pair/held_out.txt"
    num_sequences: int | None = Field(4, ge=1)


class AllocationConfig(Section):
    """Widths of weights under a budget."""

    checkpoint: CheckpointConfig
    """The checkpoint whose linears get widths."""
    bits: float | None = None
    """Budget: storage bits of a weight of the decoder on average, scales included."""
    megabytes: float | None = Field(None, validate_default=True)
    """Budget: size of the whole model in units of 10^6 bytes, everything that is not quantized at 16 bits."""
    widths: tuple[str, ...] = Field(("w8", "w6", "w4g64", "w3g64"), min_length=1)
    """Candidates for every linear, as names of weights (`w16` leaves a linear as it is)."""
    method: str = "rtn"
    """Weight method of the recipe's scheme; the divergences are measured with round to nearest."""
    skip: tuple[str, ...] = ()
    """Dotted patterns of linears that stay at 16 bits, besides lm_head and embeddings."""
    text: SensitivityText = SensitivityText()
    """The text on which outputs are compared."""
    cache: Path = Path("runs/sensitivity")
    """Folder that keeps what was measured."""

    @field_validator("megabytes")
    @classmethod
    def _one_budget(cls, value: float | None, info: ValidationInfo) -> float | None:
        budgets = {"bits": info.data.get("bits"), "megabytes": value}
        given = {name: budget for name, budget in budgets.items() if budget is not None}
        if len(given) != 1:
            found = " and ".join(f"{name}={budget:g}" for name, budget in given.items()) or "none"
            raise ConfigError(f"a budget is given either in bits or in megabytes: found {found}.")
        ((name, budget),) = given.items()
        if budget <= 0:
            raise ConfigError(f"a budget must be more than 0: found {name}={budget:g}.")
        return value

    @field_validator("widths")
    @classmethod
    def _weights_only(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(map(width_name, values)))

    @field_validator("method")
    @classmethod
    def _fits_every_width(cls, value: str, info: ValidationInfo) -> str:
        """A method that has grids for every candidate width, so that the recipe can be run."""
        for width in [each for each in info.data.get("widths", ()) if each != "w16"] or ["w4z"]:
            Scheme(Scheme.parse(width).weights, method=value)
        return value

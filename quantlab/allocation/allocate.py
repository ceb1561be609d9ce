"""allocate: a checkpoint and a budget become a recipe.

units -> budget -> sensitivities (measured once) -> the choice that costs least -> recipe
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.allocation.budget import check_budget
from quantlab.allocation.config import AllocationConfig
from quantlab.allocation.recipe import check_recipe, mixed_scheme, recipe_text, write_recipe
from quantlab.allocation.solve import choose
from quantlab.data.text import check_text, text_blocks
from quantlab.inspection.checkpoint import CheckpointInfo, inspect_checkpoint
from quantlab.inspection.precision import stored_precision
from quantlab.records import check_writable, source_hash

if TYPE_CHECKING:
    from quantlab.allocation.budget import Budget
    from quantlab.allocation.sensitivity import Sensitivities
    from quantlab.allocation.units import Unit
    from quantlab.models.loading import Checkpoint

__all__ = ["allocate"]


def allocate(
    config: AllocationConfig,
    path: Path,
    *,
    overwrite: bool = False,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Choose widths and write the recipe; returns what was chosen and what it takes, ready for JSON.

    Args:
        path: the recipe's file.
        advance: told how many divergences are known, as they are measured.

    Raises:
        UserError: a fault of checkpoint, widths, budget, text or place, found before anything is measured.
    """
    check_recipe(path, overwrite=overwrite)
    check_text(config.text)
    info = inspect_checkpoint(config.checkpoint)
    check_budget(config, info.linears, info.num_parameters, _most_scale_bits(config, info))
    check_writable(config.cache)
    import torch

    from quantlab.allocation.sensitivity import Sensitivities, measure
    from quantlab.allocation.units import budget_of, units_of
    from quantlab.evaluation.loglikelihood import check_model
    from quantlab.models.loading import load_checkpoint

    checkpoint = load_checkpoint(config.checkpoint, info)
    model = checkpoint.model
    loaded = str(model.dtype).removeprefix("torch.")
    scale_dtype = getattr(torch, stored_precision(loaded, info.source_precision))
    units = units_of(model, config, 8 * scale_dtype.itemsize)
    budget = budget_of(model, config, units)
    check_model(model, config.text.sequence_length)
    rows = model.get_input_embeddings().weight.shape[0]
    blocks = text_blocks(config.text, checkpoint.tokenizer, num_embeddings=rows)
    known = Sensitivities.open(config.cache, _made_by(config, checkpoint, scale_dtype))
    ids_NT = torch.from_numpy(blocks.ids_NT).to(model.device)
    measured = measure(model, units, config.widths, ids_NT, known, scale_dtype=scale_dtype, advance=advance)
    widths = _choose(units, config.widths, known, budget)
    result = _result(config, units, widths, known, budget) | {"num_measured": measured}
    header = _header(config, result, blocks.source, checkpoint.info.name)
    names = {name: width for unit, width in zip(units, widths, strict=True) for name in unit.names}
    text = recipe_text(path.stem, config.checkpoint, result["scheme"], names, header, config.skip)
    write_recipe(path, text)
    return result | {"recipe": str(path), "sensitivity": str(known.path)}


def _most_scale_bits(config: AllocationConfig, info: CheckpointInfo) -> int:
    """Bits of a scale; on a device that `auto` may mean they can be fewer."""
    loaded = "float32" if config.checkpoint.dtype == "auto" else config.checkpoint.dtype
    return 32 if stored_precision(loaded, info.source_precision) == "float32" else 16


def _made_by(config: AllocationConfig, checkpoint: "Checkpoint", scale_dtype: Any) -> dict[str, Any]:
    """What the divergences are the result of. Widths are not in it: each is measured by itself."""
    model = checkpoint.model
    return {
        "kind": "sensitivity",
        "checkpoint": checkpoint.content_hash(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "scale_dtype": str(scale_dtype).removeprefix("torch."),
        "text": config.text.model_dump(mode="json", exclude={"path", "format"})
        | {"sha256": check_text(config.text)},
        "code": source_hash(),
        "libraries": {name: version(name) for name in ("torch", "transformers")},
    }


def _choose(
    units: Sequence["Unit"], widths: Sequence[str], known: "Sensitivities", budget: "Budget"
) -> list[str]:
    """The width of each unit."""
    costs = [[unit.bits[width] for width in widths] for unit in units]
    losses = [[known.of(unit.name, width) for width in widths] for unit in units]
    return [widths[place] for place in choose(costs, losses, budget.capacity)]


def _result(
    config: AllocationConfig,
    units: Sequence["Unit"],
    widths: Sequence[str],
    known: "Sensitivities",
    budget: "Budget",
) -> dict[str, Any]:
    """What was chosen and what it takes, beside every width alone."""

    def taken(chosen: Sequence[str]) -> dict[str, float]:
        bits = sum(unit.bits[width] for unit, width in zip(units, chosen, strict=True))
        losses = (known.of(unit.name, width) for unit, width in zip(units, chosen, strict=True))
        return {
            "average_storage_bits": budget.average_bits(bits),
            "weights_bytes": budget.weights_bytes(bits),
            "divergence": sum(losses),
        }

    return {
        "scheme": mixed_scheme(widths, config.method),
        **taken(widths),
        "num_linears": dict(Counter(widths)),
        "alone": {width: taken([width] * len(units)) for width in config.widths},
        "widths": {unit.name: width for unit, width in zip(units, widths, strict=True)},
    }


def _header(config: AllocationConfig, result: Mapping[str, Any], source: str, name: str) -> list[str]:
    """The comment above a recipe: budget, what is expected, and what measured it."""
    asked = f"{config.bits:g} bits a weight" if config.bits is not None else f"{config.megabytes:g} MB"
    text = config.text
    return [
        f"Widths of {name} under a budget of {asked}, chosen by `quantlab allocate`.",
        _taken("Expected", result),
        *(_taken(f"With {width} everywhere", taken) for width, taken in result["alone"].items()),
        "A divergence is the mean over tokens of KL(16-bit || quantized), summed over linears that were each quantized",
        f"alone, by rounding to nearest. Text: {source}, {text.num_sequences or 'all'} blocks of "
        f"{text.sequence_length} tokens ({text.sampling}, seed {text.seed}).",
    ]


def _taken(what: str, taken: Mapping[str, Any]) -> str:
    return (
        f"{what}: {taken['average_storage_bits']:.4f} bits a weight of the decoder, "
        f"{taken['weights_bytes'] / 1e6:.3f} MB in all, divergences sum to {taken['divergence']:.4g} nats a token."
    )

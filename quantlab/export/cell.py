"""The weights that a run scored, to be written: from a run and one of its cells to a configuration. No torch.

A cell is named by its scheme, or by the first characters of its record's key.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.config import CheckpointConfig, RunConfig, build_config
from quantlab.errors import CheckpointError, ConfigError, SchemeError, nearest
from quantlab.inspection.checkpoint import content_hash, inspect_checkpoint
from quantlab.records import Record, read_records, read_run
from quantlab.schemes import Scheme

__all__ = ["config_of_cell"]

_SHORTEST_KEY = 6


def config_of_cell(
    run_dir: Path, cell: str, export: Mapping[str, Any], overrides: Sequence[str] = ()
) -> RunConfig:
    """The configuration that writes the weights of a cell: its checkpoint, scheme and settings of methods.

    Args:
        export: further fields of the section `export`.

    Raises:
        RecordError: no run, or a damaged one.
        ConfigError: no such cell, or more than one.
        CheckpointError: the checkpoint that was scored is gone or has changed.
    """
    tree = read_run(run_dir)["config"]
    record = _record_of(run_dir, cell)
    checkpoint = _checkpoint_of(record, tree["checkpoints"], run_dir)
    kept = {name: tree[name] for name in ("name", "calibration", "quantize") if name in tree}
    scheme = record.made_by["scheme"]
    asked = {"profile": None, "evaluation": None, "out": run_dir, "schemes": [scheme]}
    return build_config(
        kept | asked | {"checkpoints": [checkpoint], "export": {"scheme": scheme, **export}}, overrides
    )


def _record_of(run_dir: Path, cell: str) -> Record:
    scored = [record for record in read_records(run_dir) if record.kind == "evaluation"]
    try:
        name = Scheme.parse(cell).name
    except SchemeError:
        name = ""
    found = [record for record in scored if record.made_by["scheme"] == name]
    if not found and len(cell) >= _SHORTEST_KEY:
        found = [record for record in scored if record.key.startswith(cell)]
    if not found:
        schemes = sorted({str(record.made_by["scheme"]) for record in scored})
        hint = nearest(name or cell, schemes)
        raise ConfigError(
            f"a cell is a scheme or a record's key of the run: {run_dir} has none {cell!r}.{hint} "
            f"It has {', '.join(schemes) or 'no scores'}."
        )
    if len({record.made_by["checkpoint"]["content_hash"] for record in found}) > 1:
        listed = "; ".join(f"{r.key[:12]} of {r.made_by['checkpoint']['name']}" for r in found)
        raise ConfigError(
            f"a cell must be one: {run_dir} scored {cell!r} on several checkpoints. Name a key: {listed}."
        )
    return found[0]


def _checkpoint_of(record: Record, checkpoints: Sequence[Mapping[str, Any]], run_dir: Path) -> dict[str, Any]:
    """The entry of the run's configuration whose content was scored."""
    scored = record.made_by["checkpoint"]
    for entry in checkpoints:
        own = {name: entry[name] for name in ("path", "revision", "trust_remote_code", "device", "dtype")}
        if content_hash(inspect_checkpoint(CheckpointConfig(**own))) == scored["content_hash"]:
            return own
    raise CheckpointError(
        f"the checkpoint of a cell must be what was scored: none of {run_dir} has the content of {scored['name']} any "
        "more. Quantize the checkpoint that you have with `quantlab quantize`."
    )

"""Calibrations on disk: a folder named by the hash of what made it, computed where it is not there yet.

    runs/calibration/KEY/        see `stored`

The key covers the checkpoint's content, the tokens, dtype, dtype of the sums, transforms, the format's version, the
versions of torch and transformers, what moves the last digits (device, batch size, threads), and every source that a
calibration can run: those which `quantlab.calibration.job` reaches through imports. Until a
folder is complete each finished layer is kept: after a kill the same call runs those layers again, to have their
outputs, but sums nothing for those whose files are whole.
"""

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.calibration.collect import collect_blocks
from quantlab.calibration.layer_file import name_of
from quantlab.calibration.partial import Partial
from quantlab.calibration.statistics import Calibration
from quantlab.calibration.stored import FORMAT_VERSION, open_calibration
from quantlab.calibration.stream import Source, check_ids
from quantlab.errors import CheckpointError, OutputError
from quantlab.records import fingerprint, reachable_hash
from quantlab.sweep.store import RunStore

__all__ = ["ENTRY", "FOLDER", "calibrated"]

FOLDER = Path("runs/calibration")
"""Where calibrations go unless the configuration says otherwise."""

ENTRY = ("quantlab.calibration.job",)
"""Modules from which everything that decides the numbers is reached: how weights are read and loaded, what layers
compute of them, and the sums."""


def calibrated(
    model: nn.Module,
    ids_NT: Tensor,
    *,
    folder: Path,
    checkpoint: str,
    transforms: str = "",
    batch_size: int = 8,
    accumulate: torch.dtype = torch.float32,
    source: Source | None = None,
    advance: Callable[[int], object] = lambda count: None,
    check: Callable[[], object] = lambda: None,
) -> Calibration:
    """The calibration of a model, from disk where it is there, else computed and stored a layer at a time.

    Args:
        folder: where calibrations are kept.
        checkpoint: hash of the checkpoint's content.
        transforms: what was done to the weights since they were loaded, empty for nothing.
        check: raises where the checkpoint is no longer what it was; asked before statistics get their name.
        Others: those of `collect.collect_blocks`.

    Raises:
        CalibrationError: as `collect.collect_blocks`, or what is stored is damaged or not what its name says.
        OutputError: the folder cannot be written.
    """
    check_ids(ids_NT)
    made_by = _made_by(model, ids_NT, checkpoint, transforms, accumulate, batch_size)
    key = fingerprint(made_by)
    with RunStore(folder).claim(key):
        if not (folder / key).exists():
            try:
                partial = Partial(folder / f".{key}.partial", made_by)
                for block in collect_blocks(
                    model,
                    ids_NT,
                    batch_size=batch_size,
                    accumulate=accumulate,
                    source=source,
                    is_known=partial.has,
                    advance=advance,
                ):
                    partial.put(block)
                    # Gone before the next layer is summed.
                    del block
                try:
                    check()
                except CheckpointError:
                    partial.discard()
                    raise
                partial.finish(ids_NT, folder / key)
            except OSError as error:
                raise OutputError(
                    f"calibration must be writable: {folder / key}: {error.strerror}."
                ) from error
        return open_calibration(folder / key, made_by)


def _made_by(
    model: nn.Module,
    ids_NT: Tensor,
    checkpoint: str,
    transforms: str,
    accumulate: torch.dtype,
    batch_size: int,
) -> dict[str, Any]:
    """All that the numbers depend on."""
    return {
        "format_version": FORMAT_VERSION,
        "checkpoint": checkpoint,
        "tokens": hashlib.sha256(ids_NT.long().cpu().numpy().tobytes()).hexdigest(),
        "shape": list(ids_NT.shape),
        "dtype": name_of(next(model.parameters()).dtype),
        "accumulate": name_of(accumulate),
        "transforms": transforms,
        "libraries": {name: version(name) for name in ("torch", "transformers")},
        "computation": {
            "device": _device(model).type,
            "batch_size": batch_size,
            "threads": torch.get_num_threads(),
        },
        "code": reachable_hash(*ENTRY),
    }


def _device(model: nn.Module) -> torch.device:
    """Where a model computes: of one on the meta device, whose weights are lent, only the buffers are real."""
    devices = (tensor.device for tensor in (*model.parameters(), *model.buffers()))
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

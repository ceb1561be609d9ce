"""A quantized checkpoint as a folder: weights, config, tokenizer, generation config, card, recipe and manifest.

config.json                       the source's, with `quantization_config` and the stored dtype
model.safetensors                 or shards with model.safetensors.index.json (gguf: model.gguf, and no config.json)
generation_config.json            where the model has one
tokenizer.json, ...               as the tokenizer saves itself
README.md                         the model card
recipe.json                       scheme, format, settings, skipped linears, source and its content hash
MANIFEST.json                     sha256 and size of every file above, digests of codes; written last
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from quantlab.config import QuantizeConfig
from quantlab.errors import CheckpointError, SchemeError
from quantlab.export.architecture import known_to_engines
from quantlab.export.atomic import check_destination, new_folder
from quantlab.export.codes import Codes
from quantlab.export.config_files import write_configs, write_json
from quantlab.export.formats import Format, find_format
from quantlab.export.job import ExportJob
from quantlab.export.linears import check_linears
from quantlab.export.model_card import CardFacts, matching_scores, model_card
from quantlab.export.recipe import Origin, facts_of, recipe
from quantlab.export.shards import DEFAULT_SHARD_SIZE, Layout, write_shards
from quantlab.export.tensors import dtype_name, model_parts, stored_dtype
from quantlab.quantize import prepared
from quantlab.records import Record
from quantlab.schemes import Scheme

if TYPE_CHECKING:
    from quantlab.calibration.calibrator import Calibrator
    from quantlab.models.loading import Checkpoint

__all__ = ["ExportSummary", "export_checkpoint"]


@dataclass(frozen=True)
class ExportSummary:
    """What was written."""

    path: Path
    format_name: str
    scheme: str
    weights_bytes: int
    """Bytes of all weight files."""
    average_storage_bits: float
    """Bits on disk per quantized weight: codes, padding, scales and shapes."""
    stored_dtype: str
    swapped: tuple[str, ...]
    """Linears in low bits."""
    skipped: tuple[str, ...]
    """Decoder linears that keep their precision by request."""
    notes: tuple[str, ...] = ()
    """What the method and the transforms have to say: fallbacks, a head that was untied."""

    def summary(self) -> dict[str, Any]:
        """The same as JSON-ready data."""
        lists = {"swapped": list(self.swapped), "skipped": list(self.skipped), "notes": list(self.notes)}
        return vars(self) | {"path": str(self.path)} | lists


def export_checkpoint(
    checkpoint: "Checkpoint",
    scheme: Scheme,
    format_name: str,
    out_dir: Path,
    *,
    config: QuantizeConfig = QuantizeConfig(),
    calibrator: "Calibrator | None" = None,
    made_by: Mapping[str, Any] = MappingProxyType({}),
    records: Sequence[Record] = (),
    overwrite: bool = False,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    advance: Callable[[int], object] = lambda count: None,
) -> ExportSummary:
    """Write the checkpoint with its decoder's linears in low bits; the folder appears whole or not at all.

    Args:
        config: linears that keep their precision, widths of mixed schemes, settings of methods and transforms.
        calibrator: for schemes that need calibration.
        made_by: what records of these codes say of calibration, method, transforms and widths.
        records: where the card's scores come from; only those of this content, scheme and skip are used.
        overwrite: replace an earlier export, once the new one is complete.
        max_shard_size: bytes of a weight file; the memory needed besides the model is one such file.
        advance: called with the number of linears written since the last call.

    Raises:
        ConfigError: unknown format.
        SchemeError: the format, or this model, cannot hold the scheme.
        CalibrationError: the text or the model cannot be calibrated.
        CheckpointError: the architecture's tensors are not stored as the model holds them, or it needs code of the
            checkpoint's own.
        OutputError: the folder exists, overlaps the checkpoint or cannot be written; what was there is untouched.
    """
    form = find_format(format_name)
    form.check(scheme)
    info = checkpoint.info
    check_destination(out_dir, overwrite=overwrite, sources=(info.path, *info.files))
    _check_code(checkpoint.model)
    dtype = stored_dtype(checkpoint.model, info.source_precision)
    known, converted = known_to_engines(checkpoint, form.name)
    model = known.model
    module = import_module(form.module)
    if hasattr(module, "check"):
        module.check(known)
    check_linears(model, form, scheme, config.skip)
    if calibrator is not None and converted:
        # Statistics that are known already are of the model as it was.
        calibrator = replace(calibrator, folder=None, _known={})
    scale_dtype: torch.dtype = getattr(torch, form.scale_dtype) if form.scale_dtype else dtype
    if config.scale_dtype not in ("auto", dtype_name(scale_dtype)):
        raise SchemeError(
            f"a folder in {form.name} of this checkpoint stores scales in {dtype_name(scale_dtype)}: "
            f"quantize.scale_dtype asks for {config.scale_dtype}. Leave it auto."
        )
    with prepared(model, scheme, config, scale_dtype=scale_dtype, calibrator=calibrator) as found:
        ready = replace(found, notes=(*converted, *found.notes))
        job = ExportJob(
            model,
            checkpoint.tokenizer,
            info,
            scheme,
            ready.linears,
            dtype,
            Codes(ready.solve),
            max_shard_size,
            advance,
            ready,
        )
        if not hasattr(module, "write"):  # GGUF has names of its own, which its reader translates
            job.codes.stored = job.names.module
        # Gains that were folded change codes of o_proj: scores of the model as it was are not of these.
        own = () if converted and info.variant != "standard" else records
        origin = Origin(checkpoint.content_hash(), config, made_by, own)
        with new_folder(out_dir, overwrite=overwrite, facts={"tensors": job.codes.digests}) as folder:
            facts = _fill(folder, job, form, origin)
    return _summary(out_dir, job, facts)


def _fill(folder: Path, job: ExportJob, form: Format, origin: Origin) -> CardFacts:
    """Write every file but the manifest; returns what the card says."""
    layout, wider = _write_weights(folder, job, form)
    job.tokenizer.save_pretrained(folder)
    facts = facts_of(folder, job, form, origin, layout, wider)
    scores = matching_scores(
        origin.records, origin.content_hash, job.scheme, origin.config.skip, origin.made_by
    )
    (folder / "README.md").write_text(model_card(facts, scores), encoding="utf-8")
    write_json(folder / "recipe.json", recipe(facts, origin))
    return facts


def _summary(out_dir: Path, job: ExportJob, facts: CardFacts) -> ExportSummary:
    return ExportSummary(
        path=out_dir,
        format_name=facts.format_name,
        scheme=facts.scheme.name,
        weights_bytes=facts.weights_bytes,
        average_storage_bits=facts.average_storage_bits,
        stored_dtype=facts.stored_dtype,
        swapped=job.linears,
        skipped=job.ready.skipped,
        notes=facts.notes,
    )


def _write_weights(folder: Path, job: ExportJob, form: Format) -> tuple[Layout, list[str]]:
    """Weights, config and further files of the format; the layout, and names of tensors kept in a wider dtype."""
    module = import_module(form.module)
    if hasattr(module, "write"):
        return module.write(job, folder), []
    layout: Layout = module.layout(job)
    parts = list(model_parts(job.model, layout, job.dtype, job.names))
    write_shards(folder, [*parts, *layout.extra], job.max_shard_size, job.advance, layout.metadata)
    write_configs(folder, job.model, layout, job.dtype)
    for name, body in layout.files.items():
        write_json(folder / name, body)
    kept = (part for part in parts if not part.num_linears)
    return layout, [name for part in kept for name in part.wider_than(job.dtype)]


def _check_code(model: PreTrainedModel) -> None:
    if getattr(model.config, "auto_map", None):
        raise CheckpointError(
            f"export needs an architecture whose code is part of transformers: {type(model).__name__} brings its own "
            "(auto_map), which the folder would lack. Evaluate it instead."
        )

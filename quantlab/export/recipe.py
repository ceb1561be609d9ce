"""What the weights of a folder were made of, as recipe.json and the model card say it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantlab
from quantlab.changes import places
from quantlab.config import QuantizeConfig
from quantlab.export.formats import Format
from quantlab.export.job import ExportJob
from quantlab.export.model_card import CardFacts
from quantlab.export.shards import Layout
from quantlab.export.tensors import dtype_name, tied_names
from quantlab.records import Record

__all__ = ["Origin", "facts_of", "recipe"]

_WEIGHTS = (".safetensors", ".gguf")
"""Ends of names of weight files."""


@dataclass(frozen=True)
class Origin:
    """What the codes were made of, for the recipe and the card."""

    content_hash: str
    """Of the checkpoint."""
    config: QuantizeConfig
    made_by: Mapping[str, Any]
    records: Sequence[Record]
    """Where scores may come from."""


def facts_of(
    folder: Path, job: ExportJob, form: Format, origin: Origin, layout: Layout, wider: Sequence[str]
) -> CardFacts:
    """What the card says of a folder whose weights are written.

    Args:
        wider: names of tensors that are kept in a wider dtype than the stored one.
    """
    return CardFacts(
        scheme=job.scheme,
        format_name=form.name,
        layout=layout.name,
        base_model=job.info.name,
        content_hash=origin.content_hash,
        source_precision=job.info.source_precision,
        stored_dtype=dtype_name(job.dtype),
        num_swapped=len(job.linears),
        skipped=job.ready.skipped,
        skip=origin.config.skip,
        average_storage_bits=layout.average_storage_bits,
        weights_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS),
        tied_embeddings=bool(tied_names(job.model)),
        engines=form.engines(job.scheme),
        wider=wider,
        notes=(*job.ready.notes, *layout.notes, *_notes_of_codes(job)),
        scale_dtype=form.scale_dtype or "",
        kept_in=layout.kept_in,
    )


def recipe(facts: CardFacts, origin: Origin) -> dict[str, Any]:
    """recipe.json: enough to make the same weights again."""
    return {
        "format_version": 2,
        "quantlab": quantlab.__version__,
        "scheme": facts.scheme.name,
        "format": facts.format_name,
        "layout": facts.layout,
        "quantize": origin.config.model_dump(mode="json"),
        "made_by": dict(origin.made_by),
        "stored_dtype": facts.stored_dtype,
        "average_storage_bits": facts.average_storage_bits,
        "source": {
            "name": facts.base_model,
            "content_hash": facts.content_hash,
            "precision": facts.source_precision,
        },
    }


def _notes_of_codes(job: ExportJob) -> list[str]:
    """What methods did otherwise than asked, each with the layers and linears that it is of."""
    linears: dict[str, list[str]] = {}
    for name, note in job.codes.notes.items():
        linears.setdefault(note, []).append(name)
    return [f"{note} ({places(names)})" for note, names in linears.items()]

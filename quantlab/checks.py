"""What can be told of a run before anything is computed, without torch: its checkpoints, schemes, data and places.

A fault that headers, configurations, names and paths show is found here, not an hour later.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from quantlab.config import QuantizeConfig, RunConfig
from quantlab.data.hellaswag import load_hellaswag, select
from quantlab.data.text import check_text
from quantlab.errors import ConfigError, SchemeError, nearest
from quantlab.export.atomic import check_destination, check_place
from quantlab.export.formats import Format, find_format
from quantlab.inspection.checkpoint import CheckpointInfo, contents_of, inspect_checkpoint
from quantlab.inspection.conversions import TWINS
from quantlab.inspection.families import family_of
from quantlab.manifest import check_contents
from quantlab.schemes import Scheme, check_shapes, check_widths

__all__ = ["check", "check_calibration", "export_folder"]


def check(config: RunConfig) -> tuple[list[CheckpointInfo], dict[str, str], int | None]:
    """Everything that can be told without torch: checkpoints, schemes against shapes, data files, export.

    Returns:
        What each checkpoint is, the SHA-256 of the data of each task, and the number of HellaSwag documents selected.
    """
    schemes = [name for position in range(len(config.checkpoints)) for name in config.of(position).schemes]
    schemes += [config.export.scheme] if config.export else []
    if config.quantize.widths and not any(Scheme.parse(name).mixed for name in schemes):
        raise ConfigError(
            "quantize.widths is for schemes whose name ends in -mixed: the run has none. Add one, or leave it out."
        )
    check_place(config.folder)
    infos = [inspect_checkpoint(checkpoint) for checkpoint in config.checkpoints]
    for position, info in enumerate(infos):
        _check_skip(config.quantize.skip, info)
        exported = [config.export.scheme] if config.export and position == config.exported else []
        for name in (*config.of(position).schemes, *exported):
            _check_scheme(Scheme.parse(name), config.quantize, info)
    if config.export is not None:
        _check_export(config, infos[config.exported])
    found = _check_data(config)
    # Last, since it reads the files whole.
    for info in infos:
        check_contents(contents_of(info))
    return infos, *found


def check_calibration(config: RunConfig) -> None:
    """What can be told of the calibration of a run's first checkpoint without torch: the checkpoint and the text.

    Raises:
        CheckpointError, DataError: as `check`.
    """
    inspect_checkpoint(config.checkpoints[0])
    check_text(config.calibration.text)


def export_folder(config: RunConfig) -> Path:
    """Where the export goes: what is asked for, or a folder of the run's own."""
    assert config.export is not None
    own = config.folder / "export" / f"{config.export.scheme}-{config.export.format}"
    return config.export.out or own


def _check_scheme(scheme: Scheme, config: QuantizeConfig, info: CheckpointInfo) -> None:
    """Refuse a second scheme, and widths and group sizes that do not fit the checkpoint."""
    if info.carries is not None and not scheme.is_baseline:
        raise SchemeError(
            f"a model takes one scheme at a time: {info.path} carries {info.carries}, and {scheme.name} was asked for. "
            "Use w16, which scores it as it is, or the checkpoint that it was made from."
        )
    if info.linears:
        check_widths(scheme, config.widths, list(_without(config.skip, info)))
    check_shapes(scheme, info.linears, config.skip, config.widths)


def _check_skip(skip: Sequence[str], info: CheckpointInfo) -> None:
    """Refuse patterns that match no matrix of the checkpoint."""
    names = [*info.linears, *(name.removesuffix(".weight") for name in info.tensors)]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            short = sorted({"*." + name.rpartition(".")[2] for name in info.linears})
            hint = nearest(pattern, [*short, *names]) or f" There are {', '.join(short)}."
            raise SchemeError(f"a skip pattern must match a weight matrix: {pattern!r} matches none.{hint}")


def _check_export(config: RunConfig, info: CheckpointInfo) -> None:
    """Refuse a format that cannot hold the scheme, and a folder that must not be replaced."""
    assert config.export is not None
    form, scheme = find_format(config.export.format), Scheme.parse(config.export.scheme)
    form.check(scheme)
    if config.export.format == "gguf" and "max_shard_size" in config.export.model_fields_set:
        raise ConfigError("a GGUF file is written whole: leave max_shard_size out, or choose another format.")
    overwrite = config.export.overwrite or config.export.out is None
    check_destination(export_folder(config), overwrite=overwrite, sources=[info.path])
    _check_architecture(form, info)
    kept = _without(config.quantize.skip, info)
    kind = family_of(info.model_type, info.variant).linear_class
    if form.plain_linears and kind != "Linear" and kept:
        raise form.holds_no(kind, next(iter(kept)))
    form.check_shapes(scheme, kept if scheme.weights is not None else {})


def _check_architecture(form: Format, info: CheckpointInfo) -> None:
    """Refuse a variant of quantlab's own that the format's engines do not have."""
    if info.variant not in (None, *TWINS) and form.name != "quantlab":
        raise SchemeError(
            f"format {form.name} needs an architecture that its engines have: {info.variant} has no exact twin. "
            "Use --format quantlab."
        )


def _without(skip: Sequence[str], info: CheckpointInfo) -> dict[str, tuple[int, int]]:
    """The linears that no pattern keeps at 16 bits."""
    return {
        name: shape
        for name, shape in info.linears.items()
        if not any(fnmatchcase(name, pattern) for pattern in skip)
    }


def _check_data(config: RunConfig) -> tuple[dict[str, str], int | None]:
    """Check the files of texts and tasks; their SHA-256 by task, and the number of documents selected."""
    data: dict[str, str] = {}
    num_documents = None
    own = [config.of(position) for position in range(len(config.checkpoints))]
    named = [
        *(name for each in own for name in each.schemes),
        *([config.export.scheme] if config.export else []),
    ]
    if any(Scheme.parse(name).needs for name in named):
        data["calibration"] = check_text(config.calibration.text)
    if config.profile is not None:
        data["profile"] = check_text(config.profile.text)
    if config.evaluation is not None and "perplexity" in config.evaluation.tasks:
        data["perplexity"] = check_text(config.evaluation.perplexity)
        if data["perplexity"] == data.get("calibration"):
            raise ConfigError(
                "calibration must not read the text that perplexity is measured on: both read "
                f"{config.calibration.text.path or 'the WikiText-2 raw test split'}. Give calibration.text.path "
                "another text."
            )
    if config.evaluation is not None and "hellaswag" in config.evaluation.tasks:
        dataset = load_hellaswag(config.evaluation.hellaswag.path)
        num_documents = len(select(dataset.documents, config.evaluation.hellaswag))
        for each in own:
            assert each.evaluation is not None
            select(dataset.documents, each.evaluation.hellaswag)
        data["hellaswag"] = dataset.sha256
    return data, num_documents

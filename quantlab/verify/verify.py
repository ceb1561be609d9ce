"""`quantlab verify DIR`: files, codes, size, then every engine that loads the folder, each compared with our own model.

    files     each file is as the MANIFEST lists it, and no other is there
    codes     an independent decoder finds, bit for bit, the codes and scales that the quantizer chose
    size      low-bit weights take the bytes that the recipe promises
    readers   engines in fresh processes: logits and hidden states against the decoded weights, HellaSwag's answers

The result goes into the folder as certificate.json and as a table on its card.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import CheckpointError, ConfigError, SchemeError, VerificationError, nearest
from quantlab.export.engines import Engine
from quantlab.export.formats import find_format
from quantlab.inspection.folder import read_object
from quantlab.manifest import MANIFEST, check_files
from quantlab.schemes import Scheme
from quantlab.verify.certificate import CARD, CERTIFICATE, Certificate, content_digest, unread
from quantlab.verify.codes import CodesReport, check_codes
from quantlab.verify.config import VerifyConfig
from quantlab.verify.size import SizeReport, check_size
from quantlab.verify.sources import source_of
from quantlab.verify.writing import check_writable, write_certificate

__all__ = ["verify"]

Advance = Callable[[int], object]
RECIPE = "recipe.json"


def verify(folder: Path, config: VerifyConfig, advance: Advance = lambda count: None) -> Certificate:
    """Check a folder and write its certificate into it; `Certificate.check` raises where it is not verified.

    Args:
        advance: told how many linears and engines were checked, as they are.

    Raises:
        VerificationError: a file is not as the MANIFEST lists it. Nothing is written then, since a new MANIFEST would
            hide it.
        CheckpointError: the folder is no export of quantlab.
        ConfigError, DataError: unknown engines or unusable documents.
        OutputError: the certificate cannot be written.
    """
    check_writable(folder)
    manifest = _checked_files(folder)
    recipe = _recipe(folder)
    scheme, form = Scheme.parse(recipe["scheme"]), find_format(recipe["format"])
    engines = form.engines(scheme)
    _check_names(config, engines)
    certificate = _examined(folder, config, manifest, recipe, scheme, form.name, engines, advance)
    write_certificate(folder, certificate, manifest)
    return certificate


def _examined(
    folder: Path,
    config: VerifyConfig,
    manifest: Mapping[str, Any],
    recipe: Mapping[str, Any],
    scheme: Scheme,
    format_name: str,
    engines: tuple[Engine, ...],
    advance: Advance,
) -> Certificate:
    codes, size, broken = CodesReport(), SizeReport(0, 0, 0, 0.0), ""
    rows = tuple(unread(engine) for engine in engines)
    dataset, num_documents = "", 0
    try:
        source = source_of(folder, _skipped(recipe))
        codes = check_codes(source, manifest["tensors"], advance, whole_zeros=scheme.method != "hqq")
        if not codes.num_linears and not scheme.is_baseline:
            raise CheckpointError(
                f"a folder of {scheme.name} must hold linears in low bits: {folder} has none."
            )
        size = check_size(folder, source, codes.num_weights, recipe)
        # Engines are not shown a folder that is known to be wrong.
        if not codes.failures() and not size.failures():
            from quantlab.verify.matrix import Matrix  # torch: not for a folder that is wrong

            matrix = Matrix(folder, source, scheme, format_name, config)
            dataset, num_documents = matrix.request.dataset_sha256, len(matrix.request.documents)
            rows = tuple(matrix.row(engine, advance) for engine in engines)
    except (CheckpointError, SchemeError) as error:
        broken = str(error).replace(str(folder), folder.name).rstrip(".")
    return Certificate(
        scheme=scheme.name,
        format_name=format_name,
        content=content_digest(manifest),
        num_files=len(manifest["files"].keys() - {CARD, CERTIFICATE}),
        codes=codes,
        size=size,
        rows=rows,
        dataset_sha256=dataset,
        num_documents=num_documents,
        broken=broken,
    )


def _checked_files(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are true."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"a folder to verify must be an export of quantlab: {folder} has no {MANIFEST}."
        )
    try:
        manifest = check_files(folder)
    except CheckpointError as error:
        raise VerificationError(str(error)) from error
    if not isinstance(manifest.get("tensors"), dict) or RECIPE not in manifest["files"]:
        raise CheckpointError(
            f"a folder to verify must hold low-bit weights, with {RECIPE} and digests of its codes: {folder} does not."
        )
    return manifest


def _recipe(folder: Path) -> dict[str, Any]:
    recipe = read_object(folder / RECIPE)
    names, bits = [recipe.get("scheme"), recipe.get("format")], recipe.get("average_storage_bits", -1)
    named = all(isinstance(name, str) and len(name) <= 200 for name in names)
    if not named or not isinstance(bits, int | float) or not 0 <= bits <= 64:
        raise CheckpointError(
            f"recipe must name scheme, format and average_storage_bits: {folder / RECIPE} does not."
        )
    return recipe


def _skipped(recipe: Mapping[str, Any]) -> list[str]:
    """Patterns of linears that were skipped by request."""
    settings = recipe.get("quantize")
    skip = settings.get("skip") if isinstance(settings, dict) else None
    return [str(pattern) for pattern in skip] if isinstance(skip, list) else []


def _check_names(config: VerifyConfig, engines: tuple[Engine, ...]) -> None:
    """Engines that were asked for are engines of this folder."""
    known = [engine.name for engine in engines if engine.loads == "here"]
    for name in config.engines or ():
        if name not in known:
            hint = nearest(name, known) or f" It has {', '.join(known)}."
            raise ConfigError(f"engine {name!r} is none that loads this folder here.{hint}")

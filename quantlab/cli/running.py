"""What several verbs do with a configuration: run it, write a folder, build the report, under a bar on stderr."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.cli.printing import show
from quantlab.errors import ConfigError

if TYPE_CHECKING:
    from quantlab.config import RunConfig
    from quantlab.records import Record

__all__ = ["build_report", "run_all", "run_cell", "write_folder"]


def run_cell(config: "RunConfig", kind: str, scheme: str) -> tuple["Record", Path]:
    """One cell of the run and the file of its record; `kind` is profile or evaluation."""
    record = _run(config, only=(kind, scheme))[0]
    return record, config.folder / "records" / f"{record.key}.json"


def run_all(config: "RunConfig", json_: bool) -> None:
    """Run everything, write what is to be shipped, build the report, show the scores."""
    from quantlab import tables

    records = _run(config)
    result: dict[str, Any] = {"run": str(config.folder), "records": [record.key for record in records]}
    if config.export is not None:
        result["export"] = write_folder(config)
    result["report"] = str(build_report(config.folder))
    show(json_, result, lambda: tables.run_table(records, result))


def write_folder(config: "RunConfig") -> dict[str, Any]:
    """Write what the export section asks for; returns its summary."""
    from quantlab import pipeline
    from quantlab.progress import counted

    with counted(f"writing {config.export.scheme if config.export else 'nothing'}") as advance:
        return pipeline.export(config, advance)


def build_report(run_dir: Path) -> Path:
    try:
        from reports.page import build_report
    except ImportError as error:
        raise ConfigError(
            f"reports need the packages of quantlab[report]: {error.name} is missing."
        ) from error
    return build_report(run_dir)


def _run(config: "RunConfig", only: tuple[str, str] | None = None) -> list["Record"]:
    from quantlab import pipeline
    from quantlab.progress import RunProgress

    with RunProgress() as progress:
        return pipeline.run(config, progress.watch, only=only)

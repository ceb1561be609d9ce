"""`quantlab report`: a run's page, from its records."""

from quantlab.cli import options
from quantlab.cli.printing import show
from quantlab.cli.running import build_report


def report(run_dir: options.RunDir, json_: options.Json = False) -> None:
    """(Re)build the report of a run from its records."""
    from quantlab import tables

    page = str(build_report(run_dir))
    show(json_, {"report": page}, lambda: tables.listing("report", {"report:": page}))

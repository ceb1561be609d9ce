"""The verbs as one command, and how it ends.

Exit codes: 0 done, 1 a bug of ours, 2 the user's mistake, 130 interrupted.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from quantlab.cli.printing import complain
from quantlab.cli.verbs.allocate import allocate
from quantlab.cli.verbs.bench import bench
from quantlab.cli.verbs.calibrate import calibrate
from quantlab.cli.verbs.convert import convert
from quantlab.cli.verbs.corpus import corpus
from quantlab.cli.verbs.evaluate import evaluate
from quantlab.cli.verbs.export import export
from quantlab.cli.verbs.list import list_
from quantlab.cli.verbs.profile import profile
from quantlab.cli.verbs.quantize import quantize
from quantlab.cli.verbs.report import report
from quantlab.cli.verbs.run import run
from quantlab.cli.verbs.sweep import sweep
from quantlab.cli.verbs.train import train
from quantlab.cli.verbs.verify import verify
from quantlab.errors import UserError
from quantlab.quiet import quiet_imports

__all__ = ["VERBS", "exit_code", "main"]

VERBS: dict[str, Callable[..., None]] = {
    "profile": profile,
    "evaluate": evaluate,
    "sweep": sweep,
    "run": run,
    "quantize": quantize,
    "export": export,
    "verify": verify,
    "bench": bench,
    "calibrate": calibrate,
    "allocate": allocate,
    "corpus": corpus,
    "train": train,
    "convert": convert,
    "report": report,
    "list": list_,
}
"""In the order of `quantlab --help`."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it; typer answers with it by itself, or raises, by version."""
USAGE_ERROR: Any = typer.BadParameter.__base__
"""click's UsageError, which typer carries inside itself or imports, by version."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a verb and turn its end into an exit code."""
    sys.exit(exit_code(sys.argv[1:] if arguments is None else arguments))


def exit_code(arguments: Sequence[str]) -> int:
    """Run a verb; a mistake of the user's is one sentence on stderr, a bug of ours keeps its traceback."""
    quiet_imports()
    try:
        code = _app(
            [_dashed(argument) for argument in arguments], prog_name="quantlab", standalone_mode=False
        )
    except UserError as error:
        complain(error)
        return 2
    except USAGE_ERROR as error:
        error.show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        complain("interrupted; what was recorded is kept, and the same command goes on from there.")
    return code if isinstance(code, int) else 0


def _dashed(argument: str) -> str:
    """`--batch_size=8` as `--batch-size=8`: the field writes options both ways."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


_app = typer.Typer(
    name="quantlab",
    help="Where are a language model's outliers, what do low bits cost it, and what can be shipped?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _verb in VERBS.items():
    _app.command(_name)(_verb)

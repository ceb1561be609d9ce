"""The command line: `quantlab VERB MODEL [options] [--set section.key=value] [--out DIR]`.

A verb is a file in `quantlab/cli/verbs/` and a line in `VERBS` (`app.py`). It builds a configuration from its options
(`options.py`, `given.py`), calls one library function (`running.py`, where verbs share it) and prints its result
(`printing.py`): the result on stdout (a table, or one object with --json), log and progress on stderr. Heavy imports
wait inside the verbs, so that `quantlab --help` answers at once.
"""

from quantlab.cli.app import main

__all__ = ["main"]

"""The errors that a user can cause, at their root, and the help that an unknown name gets.

    UserError               one sentence; the command line prints it and exits with 2
    └── ProbeError          a place in the model that is not there, or cannot be observed

quantlab's own branches of the tree are in `quantlab.errors`.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A request that cannot be honoured: says what must hold, what was found and where, and what to do."""


class ProbeError(UserError):
    """A site, pattern or architecture that cannot be observed as asked."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: `" Did you mean 'x'?"`, or `""` when nothing is close."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""

"""The errors that a user can cause, at their root, and the help that an unknown name gets.

    UserError               one sentence; the command line prints it and exits with 2
    └── ProbeError          a place in the model that is not there, or cannot be observed

quantlab's own branches of the tree are in `quantlab.errors`.
"""

from collections.abc import Iterable
from difflib import get_close_matches

MAX_LENGTH = 4000
"""Characters of an error at most; of a longer one the middle is left out."""


class UserError(Exception):
    """A request that cannot be honoured: says what must hold, what was found and where, and what to do.

    It is one printable line, whatever names of files or tensors are in it: line breaks, escapes of a terminal and
    marks that turn text around are written as Python writes them.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > MAX_LENGTH:
            text = f"{text[: MAX_LENGTH // 2]} ... {text[-MAX_LENGTH // 2 :]}"
        return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ProbeError(UserError):
    """A site, pattern or architecture that cannot be observed as asked."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: `" Did you mean 'x'?"`, or `""` when nothing is close."""
    # Matching takes time with the length, and no known name is long.
    matches = get_close_matches(name[:100], list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""

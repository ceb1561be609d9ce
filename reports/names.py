"""Texts from outside made safe to show.

Checkpoint names and token texts are data of strangers: line breaks, control, bidirectional and invisible characters
are shown as escapes, so that a text cannot break a line, reorder its neighbours or hide. HTML and Markdown escaping
comes on top of it, where the text is written.
"""

import re
import unicodedata

_UNSEEN = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def visible(text: object, limit: int = 80) -> str:
    """The text on one line with nothing unseen in it, at most `limit` characters; a longer one ends in `…`."""
    raw = str(text)
    shown = "".join(_character(c) for c in raw[: limit + 1])
    return shown if len(shown) <= limit and len(raw) <= limit else shown[: limit - 1] + "…"


def token(text: object, limit: int = 40) -> str:
    """`visible`, with spaces at the ends as `␣`: a token that is a space should not look like none."""
    shown = visible(text, limit)
    bare = shown.strip(" ")
    left = len(shown) - len(shown.lstrip(" ")) if bare else len(shown)
    return "␣" * left + bare + "␣" * (len(shown) - left - len(bare))


def markdown(text: object) -> str:
    """The text, with every character that Markdown or inline HTML would act on escaped, and no link or mention in it.

    Viewers make links of bare addresses and mentions, whatever is escaped: a zero-width space breaks those.
    """
    escaped = re.sub(r"([\\`*_\[\]<>|~&$#!])", r"\\\1", str(text))
    return re.sub(
        r"(?i)(:(?=//)|(?<![a-z0-9])www(?=\.)|@|(?<![a-z0-9])(?:mailto|xmpp):)", r"\1&#8203;", escaped
    )


def _character(c: str) -> str:
    if unicodedata.category(c) not in _UNSEEN:
        return c
    return _SHORT.get(c) or (f"\\x{ord(c):02x}" if ord(c) < 0x100 else f"\\u{{{ord(c):x}}}")

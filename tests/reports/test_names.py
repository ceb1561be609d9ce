"""Texts from strangers are shown whole and harmless."""

import pytest

from reports.names import markdown, token, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name", "plain name"),
        ("two\nlines\t\r", "two\\nlines\\t\\r"),
        ("\x1b[31mred\x00", "\\x1b[31mred\\x00"),
        ("abc\u202egnp.exe", "abc\\u{202e}gnp.exe"),
        ("zero\u200bwidth\u2028", "zero\\u{200b}width\\u{2028}"),
        ("half \ud800 pair", "half \\u{d800} pair"),
        ("=cmd()|'x'", "=cmd()|'x'"),
    ],
)
def test_unseen_characters_become_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown
    visible(text).encode("utf-8")


def test_long_texts_are_cut() -> None:
    assert visible("x" * 5000, 80) == "x" * 79 + "…"
    assert len(visible("\u202e" * 50, 40)) == 40
    assert visible("x" * 80, 80) == "x" * 80


def test_a_token_that_is_a_space_can_be_seen() -> None:
    assert [token(t) for t in (" ", " the", "a b", "  x ", "")] == ["␣", "␣the", "a b", "␣␣x␣", ""]


def test_markdown_escapes_what_markdown_acts_on() -> None:
    assert markdown("a|b <img src=x> [l](u) `c` $m$ *s*") == (
        r"a\|b \<img src=x\> \[l\](u) \`c\` \$m\$ \*s\*"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://e.vil/a", "https:&#8203;//e.vil/a"),
        ("HTTP://e.vil", "HTTP:&#8203;//e.vil"),
        ("WWW.e.vil", "WWW&#8203;.e.vil"),
        ("_www.e.vil", "\\_www&#8203;.e.vil"),
        ("hey @user", "hey @&#8203;user"),
        ("mailto:a@b.c", "mailto:&#8203;a@&#8203;b.c"),
        ("w4: awwww", "w4: awwww"),
    ],
)
def test_markdown_makes_no_links_of_addresses(text: str, shown: str) -> None:
    assert markdown(text) == shown

"""Texts from strangers are shown whole and harmless; scheme names say what a figure needs."""

import pytest

from quantlab.schemes import WEIGHT_FORMATS
from reports.names import markdown, read_scheme, token, visible


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


@pytest.mark.parametrize(
    ("name", "bits", "series", "detail", "grid"),
    [
        ("w16", 16, "nothing", "", ""),
        ("w4", 4, "weights", "per channel", "w4"),
        ("w4g32z", 4, "weights", "groups of 32, zero point", "w4g32z"),
        ("w8a8", 8, "weights + activations", "weights per channel, activations per token", "w8"),
        ("w4a8", 4, "weights + activations at 8 bits", "weights per channel, activations per token", "w4"),
        ("w8a4", 4, "weights at 8 bits + activations", "weights per channel, activations per token", "w8"),
        ("l6t", 6, "attention logits", "per tensor", ""),
        ("l6m", 6, "attention logits", "per map", ""),
        ("w4g64-gptq", 4, "weights", "groups of 64, gptq", "w4g64"),
        ("q2_k", 16, "q2_k", "q2_k", ""),
        ("nf4", 4, "weights", "nf4", "nf4"),
        ("q4_1", 4, "weights", "q4_1", "w4g32z"),
        ("q4_k-a8", 4, "weights + activations at 8 bits", "activations per token, q4_k", "q4_k"),
        ("llm_int8-rotate", 8, "weights", "llm_int8, rotate", "llm_int8"),
    ],
)
def test_scheme_names(name: str, bits: int, series: str, detail: str, grid: str) -> None:
    scheme = read_scheme(name)
    assert (scheme.bits, scheme.series, scheme.detail, scheme.weight_grid) == (bits, series, detail, grid)


def test_every_format_of_weights_is_known_by_its_bits() -> None:
    for name, form in WEIGHT_FORMATS.items():
        assert read_scheme(name).parts == {"w": (form.bits, name)}

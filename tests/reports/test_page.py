"""The page: numbers of the records, one file without network, everything escaped, the same bytes each time."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from quantlab.records import read_records
from reports.page import build_report
from tests.reports.synthetic import write_run

HOSTILE = "<script>alert('x')</script>|{{ 7*7 }}\n\u202e=cmd()"
FIGURES = ("accuracy_bits", "accuracy_size", "activation_tails", "degradation", "topk_layers")


class Page(HTMLParser):
    """Tags with attributes, rows of each table as texts, and all visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag == "table":
            self._rows = self.tables.setdefault(found["id"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data.strip("\n")

    def row(self, table: str, first: str) -> list[str]:
        return next(row for row in self.tables[table] if row and row[0].startswith(first))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a hostile checkpoint name, hostile tokens and a hole, with its report."""
    folder = tmp_path_factory.mktemp("runs") / "hostile"
    names = ("Plain", HOSTILE)
    write_run(
        folder,
        checkpoints=names,
        schemes=("w16", "w8", "w4", "l4t"),
        tokens=(HOSTILE, " "),
        absent=[("Plain", "w8")],
    )
    build_report(folder)
    return folder


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_numbers_are_those_of_the_records(folder: Path, page: Page) -> None:
    (record,) = (
        r for r in read_records(folder)
        if r.kind == "evaluation" and r.made_by["scheme"] == "w4" and r.made_by["checkpoint"]["name"] == "Plain"
    )  # fmt: skip
    row, result = page.row("headline", "w4"), record.result
    low, high = result["perplexity"]["perplexity_interval"]
    assert row[5] == f"{result['perplexity']['perplexity']:.2f} [{low:.2f}, {high:.2f}]"
    low, high = (100 * end for end in result["hellaswag"]["acc_norm_interval"])
    assert row[6] == f"{100 * result['hellaswag']['acc_norm']:.1f} [{low:.1f}, {high:.1f}]"
    assert row[7] == str(result["hellaswag"]["n"])
    assert row[2] == f"{result['quantization']['weights_bytes'] / 1e6:.1f}"
    text = page.row("perplexity", "w4")
    assert f"({result['perplexity']['perplexity_stderr']:.2f})" in text[2] and text[4:] == [
        "12",
        "12",
        "6,132",
        record.result["perplexity"]["text_read_as"],
    ]
    assert f"({100 * result['hellaswag']['acc_norm_stderr']:.1f})" in page.row("accuracy", "w4")[2]
    assert "in 12 blocks of 511 tokens" in page.text and row[8] == "12"
    assert "on disk" not in page.text
    profile = next(r for r in read_records(folder) if r.kind == "profile").result["hidden_states"]
    assert page.row("layers", "0")[1:3] != [] and f"{profile['top1']:,.1f}" in page.text
    assert "Outliers of every layer, from 4,096 tokens" in page.text


def test_every_link_has_its_place_and_every_record_its_row(folder: Path, page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    for record in read_records(folder):
        assert f"records/{record.key}.json" in page.text
    titles = {attributes["title"] for tag, attributes in page.tags if tag == "td" and "title" in attributes}
    assert "from R3 − R2" in titles  # a paired change names two records


def test_the_page_is_one_file_that_needs_no_network(page: Page, html: str) -> None:
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        if "src" in attributes:
            assert (
                tag == "img"
                and attributes["src"].startswith("data:image/svg+xml;base64,")
                and attributes["alt"]
            )
    assert not re.search(r"url\(|@import|https?:", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_texts_from_outside_are_escaped(folder: Path, html: str, page: Page) -> None:
    assert "<script" not in html and "\u202e" not in html and "49" not in page.row("headline", "w16")[0]
    assert "<script>alert('x')</script>|{{ 7*7 }}\\n\\u{202e}=cmd()" in page.text
    markdown = (folder / "report" / "report.md").read_text(encoding="utf-8")
    assert (
        "\\<script\\>" in markdown and not re.search(r"(?<!\\)<script", markdown) and "\u202e" not in markdown
    )
    for line in markdown.splitlines():
        if line.startswith("| ") and "alert" in line:
            assert re.sub(r"\\.", "", line).count("|") >= 3


def test_a_hole_is_shown_and_said(page: Page) -> None:
    assert page.row("headline", "w8")[1] == "no record"
    assert "Planned but not recorded: Plain: w8." in page.text
    assert page.row("holes", "Plain")[1:3] == ["evaluation", "w8"]


def test_the_papers_numbers_are_marked(page: Page) -> None:
    assert page.row("table5", "paper: Transformer 3B")[1:3] == ["318.0", "308.2"]
    assert "not of this run: Differential Transformer, arXiv 2410.05258, Table 5" in page.text


def test_figures_are_written_twice(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "report" / "figures").iterdir())
    assert names == sorted(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))


def test_another_process_writes_the_same_bytes_without_torch(folder: Path, html: str) -> None:
    files = {path: path.read_bytes() for path in (folder / "report").rglob("*") if path.is_file()}
    code = (
        "import sys; from pathlib import Path; from reports.page import build_report;"
        "build_report(Path(sys.argv[1])); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize(
    ("tasks", "profile", "there", "absent"),
    [
        ((), True, "table5", "headline"),
        (("hellaswag",), False, "accuracy", "table5"),
        (("perplexity",), False, "headline", "accuracy"),
    ],
)
def test_parts_may_be_missing(
    tmp_path: Path, tasks: tuple[str, ...], profile: bool, there: str, absent: str
) -> None:
    write_run(tmp_path, schemes=("w16", "w8"), tasks=tasks, profile=profile, num_documents=20)
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    assert there in page.tables and absent not in page.tables
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", page.text.lower())


def test_figures_of_an_earlier_report_are_removed(tmp_path: Path) -> None:
    write_run(tmp_path, schemes=("w16", "w8"), tasks=("perplexity",), num_documents=8)
    figures = build_report(tmp_path).parent / "figures"
    assert (figures / "topk_layers.svg").exists()
    (figures / "own.png").write_bytes(b"kept")
    shutil.rmtree(tmp_path / "records")
    write_run(tmp_path, schemes=("w16", "w8"), tasks=("perplexity",), num_documents=8, profile=False)
    build_report(tmp_path)
    assert not list(figures.glob("topk_layers.*")) and (figures / "own.png").exists()


def test_a_damaged_record_is_named_on_the_page(tmp_path: Path) -> None:
    records = write_run(tmp_path, schemes=("w16", "w8"), tasks=("perplexity",), profile=False)
    (tmp_path / "records" / f"{records[1].key}.json").write_text("{}")
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    assert page.row("problems", "records/")[0] == f"records/{records[1].key}.json"
    assert "Damaged files were left out" in page.text

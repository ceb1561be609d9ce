"""Matched checkpoints: effects are those of quantlab.statistics, and a sentence claims no more than its interval."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from quantlab import statistics
from quantlab.records import Record, read_items, write_record, write_sealed
from reports.effects import MEASURES, OTHER_TOKENS, compared, effects, text_at_16_bits
from reports.load import load_run
from reports.outliers import measures, outliers, paper_figure8
from reports.page import build_report
from reports.pair_findings import NEAR_CHANCE, effect_sentence, outlier_pair_finding, pair_lead, pair_notes
from reports.pair_page import PairContent, pair_content
from reports.pair_tables import effects_table
from reports.scores import scores
from reports.tables import Table, to_markdown
from tests.reports.synthetic import comparison, evaluation_cell, write_run
from tests.reports.test_page import Page

TRIO = ("standard", "diff_v1", "diff_v2")
SCHEMES = ("w16", "w8a8", "w4a4", "l8t", "l4t", "w4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three matched checkpoints and a reference, with its report."""
    folder = tmp_path_factory.mktemp("runs") / "pair"
    write_run(folder, checkpoints=(*TRIO, "SmolLM2"), schemes=SCHEMES, compare=TRIO)
    build_report(folder)
    return folder


@pytest.fixture(scope="module")
def frame(folder: Path) -> pd.DataFrame:
    return effects(load_run(folder))


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report" / "index.html").read_text(encoding="utf-8"))


def _content(folder: Path) -> PairContent | None:
    """What the page says first of the run at `folder`."""
    run = load_run(folder)
    return pair_content(run, scores(run), outliers(run), measures(run))


def _tables(content: PairContent) -> dict[str, Table]:
    return {table.name: table for table in content.tables}


# ---- which checkpoints are compared


def test_the_pairing_is_the_runs(folder: Path) -> None:
    pairing = load_run(folder).pairing
    assert pairing is not None and pairing.labels == TRIO


def test_a_run_that_declares_none_shows_none(tmp_path: Path) -> None:
    write_run(tmp_path, checkpoints=TRIO[:2], schemes=("w16", "l4t"), num_documents=8)
    run = load_run(tmp_path)
    assert run.pairing is None and effects(run).empty and _content(tmp_path) is None


def test_records_alone_know_the_pair(tmp_path: Path) -> None:
    """Without run.json each record's own configuration says it, and the path's last part says who is who."""
    config = {"checkpoints": [{"path": f"models/{name}"} for name in TRIO], "compare": comparison(TRIO)}
    _write_alone(tmp_path, config)
    run = load_run(tmp_path)
    assert run.pairing is not None and run.pairing.labels == TRIO


def test_a_folder_with_records_of_other_runs_stays_readable(tmp_path: Path) -> None:
    """A record of a run that compares nothing changes nothing; two that disagree pair nothing."""
    config = {"checkpoints": [{"path": f"models/{name}"} for name in TRIO], "compare": comparison(TRIO)}
    _write_alone(tmp_path, config)
    record, items = evaluation_cell("other", 5, "w16", ("perplexity",), 8)
    write_record(tmp_path, record, items, {})
    assert (found := load_run(tmp_path).pairing) is not None and found.labels == TRIO
    record, items = evaluation_cell("diff_v3", 5, "w16", ("perplexity",), 8)
    other = Record.of("evaluation", record.made_by, config | {"compare": comparison(TRIO[:2])}, record.result)
    write_record(tmp_path, other, items, {})
    assert load_run(tmp_path).pairing is None


def _write_alone(folder: Path, config: dict[str, Any]) -> None:
    for place, name in enumerate(TRIO):
        record, items = evaluation_cell(name, place, "w16", ("perplexity",), 8)
        write_record(folder, Record.of("evaluation", record.made_by, config, record.result), items, {})


def test_a_plan_with_checkpoints_of_their_own_schemes_has_named_holes(tmp_path: Path) -> None:
    cells = [evaluation_cell("A", 0, s, ("perplexity",), 8) for s in ("w16", "w8", "w4")]
    cells += [evaluation_cell("B", 1, s, ("perplexity",), 8) for s in ("w16", "l4t")]
    for record, items in cells[:-1]:
        write_record(tmp_path, record, items, {})
    places = [{"path": "models/A"}, {"path": "models/B", "schemes": ["w16", "l4t"]}]
    config = {"checkpoints": places, "schemes": ["w16", "w8", "w4"], "evaluation": {"tasks": []}}
    keys = [record.key for record, _ in cells]
    write_sealed(tmp_path / "run.json", {"config": config, "config_fingerprint": "0" * 64, "records": keys})
    assert [(hole.checkpoint, hole.scheme) for hole in load_run(tmp_path).holes] == [("B", "l4t")]


# ---- the numbers


def test_effects_are_paired_differences_of_differences(folder: Path, frame: pd.DataFrame) -> None:
    run = load_run(folder)
    row = frame.query("variant == 'diff_v2' and scheme == 'l4t'").iloc[0]
    after, before, base_after, base_before = (
        _items(folder, run, name, scheme) for name in ("diff_v2", "standard") for scheme in ("l4t", "w16")
    )
    nats = [table["perplexity"]["nats"].to_numpy() for table in (after, before, base_after, base_before)]
    tokens = after["perplexity"]["num_tokens"].to_numpy()
    lost = statistics.ratio((nats[0] - nats[1]) - (nats[2] - nats[3]), tokens)
    assert (row["nats"], row["nats_low"], row["nats_high"]) == pytest.approx(
        (lost.value, lost.low, lost.high)
    )
    margins = [table["hellaswag"]["margin"].to_numpy() for table in (after, before, base_after, base_before)]
    lost = statistics.mean((margins[1] - margins[0]) - (margins[3] - margins[2]))
    assert (row["margin"], row["margin_low"], row["margin_high"]) == pytest.approx(
        (lost.value, lost.low, lost.high)
    )
    right = [
        table["hellaswag"]["correct_norm"].to_numpy(float)
        for table in (before, after, base_before, base_after)
    ]
    assert row["acc_norm"] == pytest.approx(statistics.difference_of_changes(*right).value)
    # diff_v2's invented losses are twice standard's.
    assert row["nats"] > 0 and row["n"] == 64 and row["num_documents"] == 12


def _items(folder: Path, run: Any, name: str, scheme: str) -> dict[str, pd.DataFrame]:
    key = next(c.record.key for c in run.of_kind("evaluation") if (c.checkpoint, c.scheme) == (name, scheme))
    return {task: read_items(folder, key, task) for task in ("hellaswag", "perplexity")}


def test_p_values_are_adjusted_for_the_schemes_of_a_variant(frame: pd.DataFrame) -> None:
    for _, rows in frame.groupby("variant"):
        for name in MEASURES:
            assert np.array_equal(rows[f"{name}_holm"], statistics.holm(rows[f"{name}_p"]))
            assert (
                (rows[f"{name}_p"] < 0.05) == ((rows[f"{name}_low"] > 0) | (rows[f"{name}_high"] < 0))
            ).all()


def test_a_reference_is_never_paired(frame: pd.DataFrame, page: Page) -> None:
    assert set(frame["variant"]) == {"diff_v1", "diff_v2"} and set(frame["baseline"]) == {"standard"}
    assert "For reference, and never paired: SmolLM2." in page.text
    assert not any("SmolLM2" in cell for row in page.tables["pair-outliers"] for cell in row)


def test_another_tokenizer_is_refused_on_text_and_not_on_documents(tmp_path: Path) -> None:
    _write_pair(tmp_path, tokens="ee" * 32)
    run = load_run(tmp_path)
    row = effects(run).iloc[0]
    assert pd.isna(row["nats"]) and row["nats_note"] == OTHER_TOKENS and pd.notna(row["margin"])
    content = _content(tmp_path)
    assert content is not None and OTHER_TOKENS in to_markdown(_tables(content)["pair-effects"])
    assert f"diff_v1 against standard: on nats per token, {OTHER_TOKENS} (l4t)." in content.notes


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_documents": 6}, "other items"),
        ({"scheme": "l8t"}, "no record under this scheme"),
        ({"data": {"perplexity": "ff" * 32}}, "other data or with other settings"),
    ],
)
def test_what_cannot_be_paired_says_why(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    _write_pair(tmp_path, **changed)
    run = load_run(tmp_path)
    frame = effects(run)
    row = frame.iloc[0]
    assert reason in row["note"] and pd.isna(row["margin"])
    assert reason in to_markdown(effects_table(frame))
    assert any(reason in note for note in pair_notes(run, scores(run), frame))


def _write_pair(folder: Path, *, tokens: str | None = None, scheme: str = "l4t", num_documents: int = 8,
                data: dict[str, str] | None = None) -> None:  # fmt: skip
    """standard under l4t, and a diff_v1 that differs in what is given."""
    cells = [evaluation_cell("standard", 0, s, ("hellaswag", "perplexity"), 8) for s in ("w16", "l4t")]
    for each in ("w16", scheme):
        record, items = evaluation_cell("diff_v1", 1, each, ("hellaswag", "perplexity"), num_documents)
        result = record.result | {
            "perplexity": record.result["perplexity"] | ({"tokens_sha256": tokens} if tokens else {})
        }
        made_by = record.made_by | ({"data": data} if data else {})
        cells.append((Record.of("evaluation", made_by, {}, result), items))
    for record, items in cells:
        write_record(folder, record, items, {})
    config = {"checkpoints": [{"path": f"models/{name}"} for name in TRIO[:2]], "schemes": ["w16"],
              "evaluation": {}, "compare": comparison(TRIO[:2])}  # fmt: skip
    keys = [record.key for record, _ in cells]
    write_sealed(folder / "run.json", {"config": config, "config_fingerprint": "0" * 64, "records": keys})


# ---- the sentences


def _effects(name: str = "nats", **columns: list[float]) -> pd.DataFrame:
    """Effects of l8t, l6t and l4t of one variant."""
    rows = pd.DataFrame({"variant": "V", "baseline": "B", "scheme": ["l8t", "l6t", "l4t"]})
    return rows.assign(**{f"{name}{end}": values for end, values in columns.items()}).rename(
        columns={f"{name}value": name}
    )


def test_an_effect_that_is_shown_is_said() -> None:
    rows = _effects(value=[0.001, -0.02, -0.5], _low=[-0.001, -0.03, -0.6], _high=[0.003, -0.01, -0.4],
                    _holm=[0.4, 0.01, 0.001])  # fmt: skip
    assert effect_sentence(rows, "nats") == (
        "V, on nats per token: loses less than B under l6t (−0.020 ± 0.010), l4t (−0.50 ± 0.10); "
        "within noise under l8t: its interval holds zero (an effect up to 0.003 could hide there)."
    )


def test_the_other_way_is_said_as_plainly() -> None:
    rows = _effects(
        value=[0.1, 0.2, 0.5], _low=[0.05, 0.1, 0.4], _high=[0.15, 0.3, 0.6], _holm=[0.03, 0.02, 0.001]
    )
    sentence = effect_sentence(rows, "nats")
    assert "loses more than B under l8t" in sentence and "less" not in sentence and "noise" not in sentence


def test_where_every_interval_holds_zero_nothing_is_claimed() -> None:
    rows = _effects(
        value=[0.1, -0.2, 0.0], _low=[-0.1, -0.5, -0.1], _high=[0.3, 0.1, 0.1], _holm=[1.0, 1.0, 1.0]
    )
    sentence = effect_sentence(rows, "nats")
    assert (
        "no effect is shown under l8t, l6t, l4t: every interval holds zero (an effect up to 0.5" in sentence
    )
    assert "loses" not in sentence


def test_an_interval_off_zero_that_fails_holm_is_no_claim() -> None:
    rows = _effects(
        value=[0.1, -0.2, 0.0], _low=[-0.1, -0.39, -0.1], _high=[0.3, -0.01, 0.1], _holm=[1.0, 0.09, 1.0]
    )
    sentence = effect_sentence(rows, "nats")
    assert "does not hold against the number of schemes, under l6t" in sentence and "loses" not in sentence


def test_units_follow_the_measure() -> None:
    rows = _effects("margin_norm", value=[-0.01] * 3, _low=[-0.02] * 3, _high=[-0.005] * 3, _holm=[0.01] * 3)
    assert effect_sentence(rows, "margin_norm").startswith(
        "V, on the normalised margin (nats per 100 characters): loses less than B under l8t (−1.00 ± 0.75)"
    )


def test_one_block_tells_nothing() -> None:
    nan = [np.nan] * 3
    assert "too few items to tell under l8t, l6t, l4t" in effect_sentence(
        _effects(value=[0.1] * 3, _low=nan, _high=nan, _holm=nan), "nats"
    )
    assert effect_sentence(_effects(value=nan, _low=nan, _high=nan, _holm=nan), "nats") == ""


def test_no_sentence_of_the_page_claims_what_its_interval_does_not(folder: Path, frame: pd.DataFrame) -> None:
    run = load_run(folder)
    content = _content(folder)
    assert content is not None
    logits = next(f for f in content.findings if f.subject.startswith("Low bits of attention logits"))
    claimed = next(p for p in logits.points if p.startswith("diff_v1, on nats")).split(";")[0]
    own = frame.query("variant == 'diff_v1' and kinds == 'attention logits'")
    for row in own.to_dict("records"):
        shown = row["nats_holm"] < 0.05 and (row["nats_low"] > 0 or row["nats_high"] < 0)
        assert (row["scheme"] in claimed) == shown
    assert set(logits.refs) <= {cell.ref for cell in run.cells}


def test_near_chance_is_said_only_there(tmp_path: Path, folder: Path) -> None:
    run = load_run(folder)
    frame, none = scores(run), effects(run)[:0]
    for low, high, said in ((0.2, 0.3, True), (0.26, 0.3, False)):
        at = frame.assign(acc_norm_low=low, acc_norm_high=high)
        assert (NEAR_CHANCE in list(pair_notes(run, at, none))) == said


def test_unmatched_parameters_are_named(tmp_path: Path) -> None:
    for place, (name, size) in enumerate(
        {"standard": 1_000_000, "diff_v1": 1_009_000, "diff_v2": 1_020_000}.items()
    ):
        record, items = evaluation_cell(name, place, "w16", ("perplexity",), 8, num_parameters=size)
        config = {"checkpoints": [{"path": f"models/{n}"} for n in TRIO], "compare": comparison(TRIO)}
        write_record(tmp_path, Record.of("evaluation", record.made_by, config, record.result), items, {})
    run = load_run(tmp_path)
    notes = " ".join(pair_notes(run, scores(run), effects(run)))
    assert "diff_v2 and standard are declared matched, but their parameters differ by more than 1%" in notes
    assert "diff_v1 and" not in notes
    assert "standard (1,000,000 parameters) is compared with diff_v1 (1,009,000, +0.90%)" in pair_lead(run)


# ---- outliers, and the paper beside ours


def test_magnitudes_stand_side_by_side_with_their_ratio(folder: Path, page: Page) -> None:
    run = load_run(folder)
    rows = compared(run, outliers(run)).query("tensor == 'attention_logits'").set_index("checkpoint")
    shown = page.row("pair-outliers", "Top 1")
    assert (
        shown[1] == f"{rows.loc['standard', 'top1']:.2f}" and shown[2] == f"{rows.loc['diff_v1', 'top1']:.2f}"
    )
    assert shown[3] == f"{rows.loc['standard', 'top1'] / rows.loc['diff_v1', 'top1']:.2f}×"
    assert shown[-1] == "8.20×"  # 318.0 / 38.8
    assert page.row("pair-outliers", "all maps")[1:3] == ["61.2", "40.5"]
    assert page.row("pair-outliers", "map 1")[1:3] == ["–", "31.0"]
    assert page.row("pair-lambda", "1")[1:] == ["0.280", "0.280 [0.180, 0.380]"]


def test_the_difference_at_16_bits_is_paired(folder: Path) -> None:
    run = load_run(folder)
    assert run.pairing is not None
    cells = {cell.checkpoint: cell for cell in run.of_kind("evaluation") if cell.scheme == "w16"}
    own, base = (cells[name].of_task("perplexity") for name in ("diff_v1", "standard"))
    expected = (own["nats"].sum() - base["nats"].sum()) / base["num_tokens"].sum()
    found = {name: (estimate, refs) for name, estimate, refs in text_at_16_bits(run)}
    assert list(found) == ["diff_v1", "diff_v2"]
    assert found["diff_v1"][0].value == pytest.approx(expected)
    assert found["diff_v1"][1] == (cells["diff_v1"].ref, cells["standard"].ref)
    notes = " ".join(pair_notes(run, scores(run), effects(run)))
    assert "At 16 bits diff_v1's nats per token minus standard's" in notes


def _record_without_plan(folder: Path, place: int, paths: tuple[str, str], **settings: Any) -> None:
    name = Path(paths[place]).name
    record, items = evaluation_cell(name, place, "w16", ("perplexity",), 8)
    made_by = record.made_by | settings
    config = {
        "checkpoints": [{"path": p} for p in paths],
        "compare": {"baseline": paths[0], "against": [paths[1]]},
    }
    write_record(folder, Record.of("evaluation", made_by, config, record.result), items, {})


def test_paths_that_end_alike_are_not_taken_for_each_other(tmp_path: Path) -> None:
    _record_without_plan(tmp_path, 0, ("A/standard", "B/standard"))
    pairing = load_run(tmp_path).pairing
    assert pairing is not None and pairing.baseline not in pairing.variants


def test_records_of_several_settings_without_a_plan_are_not_paired(tmp_path: Path) -> None:
    paths = ("models/standard", "models/diff_v1")
    for place in (0, 1):
        _record_without_plan(tmp_path, place, paths)
    assert load_run(tmp_path).pairing is not None
    _record_without_plan(tmp_path, 0, paths, bos="always")
    assert load_run(tmp_path).pairing is None


@pytest.mark.parametrize(("own", "words"), [(40.0, "2.0 times smaller than"), (160.0, "2.0 times larger than"),
                                            (81.0, "about as large as"), (0.0, "not comparable with")])  # fmt: skip
def test_larger_and_smaller_are_not_confused(folder: Path, own: float, words: str) -> None:
    run = load_run(folder)
    assert run.pairing is not None
    rows = outliers(run).query("tensor == 'attention_logits'").assign(top1=80.0)
    rows.loc[rows["checkpoint"] == "diff_v1", "top1"] = own
    finding = outlier_pair_finding(rows, run.pairing)
    assert finding is not None and words in finding.points[0] and "without an interval" in finding.points[-1]


def test_figure_8_stands_beside_ours_and_is_marked(page: Page) -> None:
    paper = paper_figure8().set_index("checkpoint")
    assert list(paper.loc["Transformer 3B"]) == [63.4, 62.7, 58.9, 33.9]
    assert page.row("figure8", "paper: DIFF")[1:4] == ["66.2", "66.3", "66.0"]
    ours = page.row("figure8", "standard")
    assert ours[3] == "–" and "[" in ours[4]  # no l6t in this run
    assert "not of this run: Differential Transformer, arXiv 2410.05258, Figure 8" in page.text


def test_figure_8_needs_schemes_of_attention_logits(tmp_path: Path) -> None:
    write_run(tmp_path, checkpoints=TRIO[:2], schemes=("w16", "w8a8"), compare=TRIO[:2], num_documents=8)
    content = _content(tmp_path)
    assert content is not None and "figure8" not in _tables(content) and _tables(content)["pair-effects"].rows
    assert content.figures["figure8"] is None


def test_the_pair_comes_first_and_in_the_markdown_too(folder: Path, page: Page) -> None:
    ids = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert ids[:2] == ["pair", "findings"]
    figures = {path.stem for path in (folder / "report" / "figures").glob("*.svg")}
    assert {"effects", "pair_bits", "figure8"} <= figures
    markdown = (folder / "report" / "report.md").read_text(encoding="utf-8")
    assert markdown.index("## Matched checkpoints") < markdown.index("## Findings")
    assert "figures/effects.png" in markdown


@pytest.mark.parametrize(
    ("tasks", "profile"), [((), True), (("hellaswag",), False), (("perplexity",), False)]
)
def test_parts_of_a_pair_may_be_missing(tmp_path: Path, tasks: tuple[str, ...], profile: bool) -> None:
    write_run(tmp_path, checkpoints=TRIO[:2], schemes=("w16", "l4t"), compare=TRIO[:2], tasks=tasks,
              profile=profile, num_documents=8)  # fmt: skip
    content = _content(tmp_path)
    assert content is not None
    tables = _tables(content)
    assert bool(tables["pair-effects"].rows) == bool(tasks) and bool(tables["pair-outliers"].rows) == profile


def test_a_variant_without_any_record_leaves_a_page(tmp_path: Path) -> None:
    absent = [("diff_v1", scheme) for scheme in ("w16", "l4t")]
    write_run(
        tmp_path, checkpoints=TRIO[:2], schemes=("w16", "l4t"), compare=TRIO[:2], profile=False, absent=absent
    )
    content = _content(tmp_path)
    assert content is not None and "models/diff_v1 (no record)" in content.lead

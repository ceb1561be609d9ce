"""Results as tables for people at a terminal; `--json` prints the same values whole."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from quantlab.records import Record
from quantlab.statistics import TOO_FEW

_MOST_NOTES = 8
"""Notes that are printed; the others are where the result is."""
_MAGNITUDES = ("top1", "top2", "top3", "top10", "top100", "median", "top1_over_median")


def listing(title: str, lines: Mapping[str, str]) -> Table:
    """One line per name."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(title, no_wrap=True)
    table.add_column()
    for name, line in lines.items():
        table.add_row(escape(name), escape(line))
    return table


def profile_table(record: Record, path: Path) -> Group:
    """Magnitudes of attention logits and hidden states, and the largest of each with its place."""
    table = Table("tensor", "n", *_MAGNITUDES, box=None, pad_edge=False)
    lines: list[Any] = [table]
    for name in ("attention_logits", "hidden_states"):
        values = record.result.get(name)
        if values is None:
            continue
        cells = [_number(values[magnitude]) for magnitude in _MAGNITUDES]
        table.add_row(name.replace("_", " "), f"{values['n']:,}", *cells)
        if values["top"]:
            lines.append(f"largest of {name.replace('_', ' ')}: {escape(_place(values['top'][0]))}")
    if record.result.get("unprofiled"):
        lines.append(escape(str(record.result["unprofiled"])))
    return Group(*lines, *_origin(record, path))


def score_table(record: Record, path: Path) -> Group:
    """Scores with n, standard errors and 95% intervals; below, what was quantized, notes, and how it was read."""
    table = Table("task", "score", "value", "stderr", "95% interval", "n", box=None, pad_edge=False)
    for row in _score_rows(record.result):
        table.add_row(*row)
    quantization = record.result["quantization"]
    widths = ", ".join(f"{share:.1%} at {bits} bits" for bits, share in quantization["share_by_bits"].items())
    lines = [
        f"scheme {record.made_by['scheme']}: decoder weights {widths}; embeddings and lm_head at 16 bits",
        *_shown(notes_of(quantization), "in the record"),
    ]
    if shares := record.result.get("cached_share"):
        read = ", ".join(f"{share:.1%} of {task}" for task, share in shares.items())
        lines.append(f"read behind the window, from the quantized cache: {read}")
    if text := record.result.get("perplexity"):
        lines.append(_text_line(text))
    if hellaswag := record.result.get("hellaswag"):
        lines.append(f"BOS {escape(hellaswag['bos'])}; context shared: {escape(hellaswag['sharing_reason'])}")
    return Group(table, *lines, *_origin(record, path))


def _text_line(text: Mapping[str, Any]) -> str:
    """Which text, how it was read, and what its intervals count."""
    units = f"intervals of {text['num_documents']} documents"
    note = f" ({text['interval_note']})" if text["interval_note"] else ""
    return f"text {escape(text['source'])}, {text['text_read_as']}; {units}{note}"


def run_table(records: Sequence[Record], result: Mapping[str, Any]) -> Group:
    """Scores of a whole run, one row per checkpoint and scheme, and where its export and report are."""
    table = Table(
        "checkpoint", "scheme", "acc_norm", "margin [nats]", "nats per token", "n", box=None, pad_edge=False
    )
    for record in records:
        if record.kind == "evaluation":
            hellaswag, text = record.result.get("hellaswag"), record.result.get("perplexity")
            table.add_row(
                escape(record.made_by["checkpoint"]["name"]),
                record.made_by["scheme"],
                _scored(hellaswag, "acc_norm"),
                _scored(hellaswag, "margin"),
                _scored(text, "nats_per_token"),
                str(hellaswag["n"]) if hellaswag else "",
            )
    exported = [f"weights: {escape(result['export']['path'])}"] if "export" in result else []
    return Group(table, *exported, f"report: {escape(result['report'])}")


def export_table(summary: Mapping[str, Any]) -> Group:
    """What was written and how large it is; below, what methods and transforms have to say."""
    written = {name: str(value) for name, value in summary.items() if not isinstance(value, list)}
    return Group(listing("export", written), *_shown(summary["notes"], "in README.md"))


def notes_of(quantization: Mapping[str, Any]) -> list[str]:
    """What transforms have to say, then each note of linears once, with how many they are, the most frequent first."""
    counts: Counter[str] = Counter()
    for row in quantization.get("table", ()):
        if note := row.get("note"):
            counts[note] += row["count"]
    of_linears = (
        f"{note} ({count} {'linear' if count == 1 else 'linears'})" for note, count in counts.most_common()
    )
    return [*quantization.get("notes", ()), *of_linears]


def _shown(notes: Sequence[str], rest: str) -> list[str]:
    """A line for each of the first notes; `rest` says where the others are."""
    lines = [f"note: {escape(note)}" for note in notes[:_MOST_NOTES]]
    more = len(notes) - len(lines)
    return [*lines, f"and {more} more notes {rest}"] if more else lines


def _score_rows(result: Mapping[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = []
    if hellaswag := result.get("hellaswag"):
        for score in ("acc", "acc_norm", "margin", "nats_per_token"):
            stderr = _number(hellaswag[f"{score}_stderr"])
            value, interval = _with_interval(hellaswag, score)
            rows.append(["hellaswag", score, value, stderr, interval, str(hellaswag["n"])])
    if text := result.get("perplexity"):
        for score in ("nats_per_token", "perplexity"):
            stderr = _number(text[f"{score}_stderr"]) if f"{score}_stderr" in text else ""
            value, interval = _with_interval(text, score)
            rows.append(["perplexity", score, value, stderr, interval, f"{text['num_tokens']:,} tokens"])
    return rows


def _with_interval(values: Mapping[str, Any], score: str) -> tuple[str, str]:
    low, high = values[f"{score}_interval"]
    shown = TOO_FEW if low is None or high is None else f"{_number(low)} to {_number(high)}"
    return _number(values[score]), shown


def _origin(record: Record, path: Path) -> list[str]:
    """Which weights these are, and where the record is."""
    source = record.made_by["checkpoint"]
    weights = (
        f"{source['name']}: {source['source_precision']} weights in {source['dtype']} on {source['device']}"
    )
    return [escape(weights), f"record: {escape(str(path))}"]


def _scored(values: Mapping[str, Any] | None, score: str) -> str:
    if values is None:
        return ""
    value, interval = _with_interval(values, score)
    return f"{value} ({interval})"


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _place(entry: Mapping[str, Any]) -> str:
    value = _number(entry["value"])
    place = ", ".join(
        f"{name} {entry[name]!r}" for name in entry if name != "value" and entry[name] is not None
    )
    return f"{value} at {place}"

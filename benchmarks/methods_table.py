"""The table of methods in docs/methods.md, from the records of runs of configs/methods.

    quantlab run configs/methods/weights.yaml
    quantlab run configs/methods/activations.yaml
    quantlab run configs/methods/autoround.yaml
    python benchmarks/methods_table.py runs/methods-weights runs/methods-activations runs/methods-autoround

Perplexity with its 95% interval; the change of nats per token from 16 bits, paired, with documents of the text as
units; HellaSwag's acc_norm with its interval, and the change of the margin between the right ending and the best wrong
one, paired by document. A task that a scheme has no record of stays empty. Every record of a folder counts, also those
of an earlier plan of the run.
"""

import argparse
from pathlib import Path

from quantlab import statistics
from quantlab.config import load_config
from quantlab.records import Record, read_items, read_record

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "methods"
FILES = ("weights", "activations", "autoround")
SCHEMES = [
    "w16",
    *(name for file in FILES for name in load_config(CONFIGS / f"{file}.yaml").schemes),
]
HEAD = (
    "| scheme | bits a weight | perplexity | nats a token over 16-bit | acc_norm % | change of margin |\n"
    "|---|---|---|---|---|---|"
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders of runs of one checkpoint and one setting"
    )
    found: dict[str, dict[str, tuple[Path, Record]]] = {}
    for folder in parser.parse_args().runs:
        for record in map(read_record, sorted((folder / "records").glob("*.json"))):
            for task in ("perplexity", "hellaswag"):
                if task in record.result:
                    found.setdefault(str(record.made_by["scheme"]), {})[task] = (folder, record)
    counts = {task: {entry[task][1].result[task]["n"] for entry in found.values() if task in entry}
              for task in ("perplexity", "hellaswag")}  # fmt: skip
    print(f"n: {counts}\n\n{HEAD}")  # noqa: T201
    for scheme in sorted(found, key=_place):
        print(_row(scheme, found[scheme], found["w16"]))  # noqa: T201


def _place(scheme: str) -> tuple[int, str]:
    """The order of the configurations, weights first; others behind."""
    return (SCHEMES.index(scheme) if scheme in SCHEMES else len(SCHEMES), scheme)


def _row(scheme: str, entry: dict[str, tuple[Path, Record]], base: dict[str, tuple[Path, Record]]) -> str:
    record = next(iter(entry.values()))[1]
    cells = [scheme, f"{record.result['quantization']['average_storage_bits']:.2f}"]
    cells += _perplexity(entry, base) if "perplexity" in entry else ["", ""]
    cells += _hellaswag(entry, base) if "hellaswag" in entry else ["", ""]
    return f"| {' | '.join(cells)} |"


def _perplexity(entry: dict[str, tuple[Path, Record]], base: dict[str, tuple[Path, Record]]) -> list[str]:
    (folder, record), (base_folder, base_record) = entry["perplexity"], base["perplexity"]
    mine, theirs = (
        read_items(where, each.key, "perplexity")
        for where, each in ((folder, record), (base_folder, base_record))
    )
    change = statistics.paired_text_difference(
        mine["nats"], theirs["nats"], mine["num_tokens"], mine["document"]
    )
    result = record.result["perplexity"]
    low, high = result["perplexity_interval"]
    return [f"{result['perplexity']:.2f} [{low:.1f}, {high:.1f}]", _change(change)]


def _hellaswag(entry: dict[str, tuple[Path, Record]], base: dict[str, tuple[Path, Record]]) -> list[str]:
    folder, record = entry["hellaswag"]
    result = record.result["hellaswag"]
    low, high = (100 * end for end in result["acc_norm_interval"])
    cell = f"{100 * result['acc_norm']:.1f} [{low:.1f}, {high:.1f}]"
    if "hellaswag" not in base:
        return [cell, ""]
    base_folder, base_record = base["hellaswag"]
    mine, theirs = (
        read_items(where, each.key, "hellaswag")["margin"]
        for where, each in ((folder, record), (base_folder, base_record))
    )
    return [cell, _change(statistics.paired_difference(mine, theirs))]


def _change(estimate: statistics.Estimate) -> str:
    return f"{estimate.value:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"


if __name__ == "__main__":
    main()

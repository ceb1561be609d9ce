"""The README.md of a folder: what was quantized, what it scores, who runs it fast. Needs no torch.

Scores come only from records of the same checkpoint content, the same scheme and the same skipped linears; where there
is none the card says "not measured". The front matter follows the Hugging Face hub's metadata (`base_model`,
`base_model_relation`, `model-index`).
"""

from quantlab.export.model_card.card import model_card
from quantlab.export.model_card.facts import CardFacts
from quantlab.export.model_card.scores import matching_scores

__all__ = ["CardFacts", "matching_scores", "model_card"]

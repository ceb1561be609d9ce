"""Weights from one implementation's layout to another's: state dicts with their configurations, or whole folders.

unilm's V1 <-> quantlab's diff_v1 <-> Hugging Face's DiffLlama, and quantlab's standard <-> Hugging Face's Llama. The
function that the weights compute stays the same; a model that the other side cannot express is refused.
"""

from quantlab.models.converters.diffllama import from_diffllama, to_diffllama
from quantlab.models.converters.folder import convert_folder
from quantlab.models.converters.layouts import relayout
from quantlab.models.converters.llama import from_llama, to_llama
from quantlab.models.converters.unilm import from_unilm, to_unilm

__all__ = [
    "convert_folder",
    "from_diffllama",
    "from_llama",
    "from_unilm",
    "relayout",
    "to_diffllama",
    "to_llama",
    "to_unilm",
]

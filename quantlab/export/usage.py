"""How a folder is loaded, format by format: the lines that a model card shows. Needs no torch."""

__all__ = ["USAGE"]

_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder{arguments})
```"""

_GPTQMODEL = """```python
from gptqmodel import GPTQModel

model = GPTQModel.load("path/to/this/folder")
```"""


def _with(packages: str, arguments: str = "") -> str:
    return f"Needs the packages {packages}.\n\n{_TRANSFORMERS.format(arguments=arguments)}"


USAGE: dict[str, str] = {
    "compressed-tensors": _with("`transformers` and `compressed-tensors`"),
    "gptq": f"Needs the package `gptqmodel`; with `optimum` beside it, transformers loads it too.\n\n{_GPTQMODEL}",
    "awq": f"Needs the package `gptqmodel`.\n\n{_GPTQMODEL}",
    "bitsandbytes": _with("`transformers` and `bitsandbytes`"),
    "torchao": _with("`transformers` and `torchao`"),
    "gguf": _with(
        "`transformers` and `gguf`, or llama.cpp: `llama-cli -m model.gguf`", ', gguf_file="model.gguf"'
    ),
    "quanto": """Needs the package `optimum-quanto`.

```python
from optimum.quanto import QuantizedModelForCausalLM

model = QuantizedModelForCausalLM.from_pretrained("path/to/this/folder")
```""",
    "quantlab": """Needs the package `quantlab`; `docs/quantlab-format.md` there specifies the layout.

```python
from pathlib import Path
from quantlab.models.low_bit import load_low_bit

checkpoint = load_low_bit(Path("path/to/this/folder"))
```""",
}
"""Format -> Markdown."""

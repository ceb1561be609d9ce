"""quantlab: quantization and outlier analysis of causal language models.

The main path, top-down, is `quantlab.pipeline`; the command line is `quantlab.cli`. Importing this package
imports nothing heavy.
"""

__version__ = "0.1.0"

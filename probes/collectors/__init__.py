"""Collectors: each watches some modules through one pass over text and fills running statistics.

A collector has `names`, the modules that it watches; `see`, the hook; and `result()`, JSON-ready. It keeps statistics,
never activations.
"""

"""probes: look at a model, never change it.

Attention sites, hooks, streaming statistics and the outlier measures built on them. Start at `probes.profile`.
"""

"""Modules that stand in the place of a model's own while a scheme is on it, and how those places are found."""

"""Scores of a model: HellaSwag and perplexity, each with its items, its standard errors and its intervals."""

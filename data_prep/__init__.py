"""Corpus → sentence shards. Knows nothing of models and never imports torch."""

__version__ = "0.1.0"

"""Corpus → sentence shards. Knows nothing of models and never imports torch."""

"""Sentence shards → SentenceVAE → SLLM: models, training, evaluation and generation."""

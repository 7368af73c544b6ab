"""SentenceVAE, SLLM, token-level model; building, loading, saving, counting their operations."""

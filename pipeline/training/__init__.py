"""One training run, step by step."""

"""A model behind OpenAI's HTTP API: continuous batching at sentence ends."""

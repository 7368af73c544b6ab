"""The `sllm` command."""

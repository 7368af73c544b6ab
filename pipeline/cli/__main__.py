"""`python -m pipeline.cli`: the `sllm` command."""

from pipeline.cli import console

raise SystemExit(console())

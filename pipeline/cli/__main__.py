"""`python -m pipeline.cli`: the `sllm` command."""

from pipeline.cli.main import console

raise SystemExit(console())

"""`python -m data_prep.cli`: the `data-prep` command."""

from data_prep.cli import console

raise SystemExit(console())

"""Folders of the repository."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "pipeline" / "recipes"
STRATEGIES = REPOSITORY / "ds_configs"

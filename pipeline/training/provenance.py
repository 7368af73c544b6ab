"""What a run is made from: shards, packages, device."""

from __future__ import annotations

import platform
from typing import Any

from data_prep.common.environment import package_versions
from data_prep.shards.reader import ShardSet

PROVENANCE = "provenance.json"  # in the run directory
_PACKAGES = ("sentence-llm", "torch", "transformers", "deepspeed", "numpy", "tokenizers", "sentencepiece")


def provenance(shard_sets: list[ShardSet], validation: list[ShardSet], device: str) -> dict[str, Any]:
    """The content of `provenance.json`: packages, Python, device, and each shard set's folder, fingerprint,
    settings and totals."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name, found in package_versions(_PACKAGES).items() if found},
        "device": device,
        "shards": [_describe(shard_set) for shard_set in shard_sets],
        "validation": [_describe(shard_set) for shard_set in validation],
    }


def _describe(shard_set: ShardSet) -> dict[str, Any]:
    return {
        "folder": str(shard_set.folder),
        "fingerprint": shard_set.fingerprint,
        "settings": shard_set.settings.to_dict(),
        "totals": dict(shard_set.manifest["totals"]),
    }

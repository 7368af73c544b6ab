"""What a run is made from: shards, packages, device."""

from __future__ import annotations

import platform
from typing import Any

from data_prep.common.environment import package_versions
from data_prep.corpus.compression import CONTAMINATED, MARKS
from data_prep.corpus.filters import DUPLICATE, NEAR_DUPLICATE, SHARES_WORDS
from data_prep.shards.reader import ShardSet

COMPARISONS = ("near_duplicates", "decontaminate")  # settings of a shard set
COMPARED = (DUPLICATE, NEAR_DUPLICATE, SHARES_WORDS)  # reasons of its quarantine
PROVENANCE = "provenance.json"  # in the run directory
_PACKAGES = ("sentence-llm", "torch", "transformers", "deepspeed", "numpy", "tokenizers", "sentencepiece")


def provenance(shard_sets: list[ShardSet], validation: list[ShardSet], device: str) -> dict[str, Any]:
    """The content of `provenance.json`: packages, Python, device, and each shard set's folder, fingerprint,
    settings and totals, and which documents it left out by comparison."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name, found in package_versions(_PACKAGES).items() if found},
        "device": device,
        "shards": [_describe(shard_set) for shard_set in shard_sets],
        "validation": [_describe(shard_set) for shard_set in validation],
    }


def _describe(shard_set: ShardSet) -> dict[str, Any]:
    manifest = shard_set.manifest
    comparisons = {key: manifest["settings"][key] for key in COMPARISONS if key in manifest["settings"]}
    left_out = {reason: n for reason, n in manifest["rejected"].items() if reason in COMPARED}
    marked = manifest.get("marked", {}).get(MARKS[CONTAMINATED], 0)
    compared = {"comparisons": comparisons | {"left_out": left_out, "marked": marked}} if comparisons else {}
    return compared | {
        "folder": str(shard_set.folder),
        "fingerprint": shard_set.fingerprint,
        "settings": shard_set.settings.to_dict(),
        "totals": dict(shard_set.manifest["totals"]),
    }

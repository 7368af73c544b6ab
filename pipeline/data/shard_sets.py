"""Shard sets that one run reads: made alike, or refused."""

from __future__ import annotations

from data_prep.common.errors import UserError
from data_prep.shards.reader import ShardSet


def open_shards(folders: list[str], like: ShardSet | None = None) -> list[ShardSet]:
    """Open shard sets made alike: one tokenizer, segmenter and sentence limit (those of `like` if given).

    Raises: UserError when they differ.
    """
    shard_sets = [ShardSet.open(folder) for folder in folders]
    like = like or shard_sets[0]
    fingerprint = like.tokenizer().fingerprint
    for folder, shard_set in zip(folders, shard_sets, strict=True):
        if shard_set.tokenizer().fingerprint != fingerprint:
            raise UserError(
                f"shards {folder} were made with another tokenizer than the training shards: make them again"
            )
        for name in ("segmenter", "max_tokens"):
            ours, theirs = getattr(shard_set.settings, name), getattr(like.settings, name)
            if ours != theirs:
                raise UserError(
                    f"shards {folder} were made with {name} {ours}, the training shards with {theirs}: "
                    "make them again"
                )
    return shard_sets

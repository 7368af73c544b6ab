"""The settings of a shard set."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from data_prep.common.errors import UserError
from data_prep.corpus import near_duplicates
from data_prep.corpus.decontamination import HeldOutTexts
from data_prep.corpus.filters import Filters
from data_prep.shards.layout import ZSTD_LEVEL
from data_prep.shards.reader import ShardSet
from data_prep.text.segment_rules import VERSION as SEGMENTER_VERSION
from data_prep.text.sentences import SentenceSettings


@dataclass(frozen=True)
class ShardSettings:
    """The settings that, with input and tokenizer, determine the bytes of a shard set; in the manifest.

    Args:
        shard_bytes: size of a shard's arrays at which the next shard starts.
        shard_documents: likewise in documents; 0 for no limit.
        unit_bytes: text per unit of work; None to derive it from the size of the input.
        near_duplicates: share of words from which documents count as the same; None to keep all.
        seen: folders of shard sets whose documents count as earlier ones.
        test_texts: texts that documents must not share a span with.
    """

    sentences: SentenceSettings
    hygiene: Filters = Filters()
    deduplicate: bool = False
    shard_bytes: int = 64_000_000
    shard_documents: int = 0
    compression: str = "none"
    unit_bytes: int | None = None
    near_duplicates: float | None = None
    seen: tuple[str, ...] = ()
    test_texts: HeldOutTexts | None = None

    def __post_init__(self) -> None:
        if self.near_duplicates is None and self.seen:
            raise UserError("--seen is for near-duplicates: add for example --near-duplicates 0.8")
        if self.near_duplicates is not None and not 0.3 <= self.near_duplicates <= 1:
            raise UserError(f"--near-duplicates must be from 0.3 to 1, not {self.near_duplicates:g}")

    @property
    def compares(self) -> bool:
        """Whether documents are compared with each other before they are written."""
        return self.deduplicate or self.near_duplicates is not None

    def to_dict(self) -> dict:
        optional = ("near_duplicates", "seen", "test_texts")  # unknown to sets of earlier versions
        own = {f.name: getattr(self, f.name) for f in fields(self)[2:] if f.name not in optional}
        level = {"zstd_level": ZSTD_LEVEL} if self.compression == "zstd" else {}
        versions = {"segmenter_version": SEGMENTER_VERSION}
        return (
            self.sentences.to_dict() | versions | {"hygiene": self.hygiene.to_dict()} | own | level
        ) | self._comparisons

    @functools.cached_property
    def _comparisons(self) -> dict:
        near = {
            "near_duplicates": {
                "similarity": self.near_duplicates,
                "signatures": near_duplicates.require(),
                "seen": [ShardSet.open(folder).fingerprint for folder in self.seen],
            }
        }
        tests = {"decontaminate": self.test_texts.to_dict()} if self.test_texts else {}
        return (near if self.near_duplicates is not None else {}) | tests

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
        salvage: also take what can be decoded of damaged members.
        near_duplicates: share of words from which documents count as the same; None to keep all.
        seen: folders of shard sets whose documents count as earlier ones.
        test_texts: texts that documents must not share a span with.
        mark_contaminated: mark such documents and keep them.
    """

    sentences: SentenceSettings
    hygiene: Filters = Filters()
    deduplicate: bool = False
    shard_bytes: int = 64_000_000
    shard_documents: int = 0
    compression: str = "none"
    unit_bytes: int | None = None
    salvage: bool = False
    near_duplicates: float | None = None
    seen: tuple[str, ...] = ()
    test_texts: HeldOutTexts | None = None
    mark_contaminated: bool = False

    def __post_init__(self) -> None:
        if self.near_duplicates is None and self.seen:
            raise UserError("--seen is for near-duplicates: add for example --near-duplicates 0.8")
        if self.near_duplicates is not None and not 0.3 <= self.near_duplicates <= 1:
            raise UserError(f"--near-duplicates must be from 0.3 to 1, not {self.near_duplicates:g}")
        if self.mark_contaminated and not self.test_texts:
            raise UserError("--mark-contaminated needs the test texts: add --decontaminate FILE")

    @property
    def compares(self) -> bool:
        """Whether documents are compared with each other before they are written."""
        return self.deduplicate or self.near_duplicates is not None

    @functools.cached_property
    def seen_shards(self) -> list[tuple[str, int]]:
        """(folder, shard) of the sets in `seen`; computed once for all processes."""
        sets = [(folder, len(ShardSet.open(folder))) for folder in self.seen]
        return [(folder, shard) for folder, shards in sets for shard in range(shards)]

    def to_dict(self) -> dict:
        optional = ("salvage", "near_duplicates", "seen", "test_texts", "mark_contaminated")
        own = {f.name: getattr(self, f.name) for f in fields(self)[2:] if f.name not in optional}
        level = {"zstd_level": ZSTD_LEVEL} if self.compression == "zstd" else {}
        versions = {"segmenter_version": SEGMENTER_VERSION}
        hygiene = {"hygiene": self.hygiene.to_dict()}
        return self.sentences.to_dict() | versions | hygiene | own | level | self._later

    @functools.cached_property
    def _later(self) -> dict:
        """Settings that sets of earlier versions do not have, where they are used."""
        settings: dict = {"salvage": True} if self.salvage else {}
        if self.near_duplicates is not None:
            settings["near_duplicates"] = {
                "similarity": self.near_duplicates,
                "signatures": near_duplicates.require(),
                "seen": [ShardSet.open(folder).fingerprint for folder in self.seen],
            }
        if self.test_texts:
            settings["decontaminate"] = self.test_texts.to_dict() | {"only_marked": self.mark_contaminated}
        return settings

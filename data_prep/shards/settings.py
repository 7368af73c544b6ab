"""The settings of a shard set."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from data_prep.corpus.filters import Filters
from data_prep.shards.layout import ZSTD_LEVEL
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
    """

    sentences: SentenceSettings
    hygiene: Filters = Filters()
    deduplicate: bool = False
    shard_bytes: int = 64_000_000
    shard_documents: int = 0
    compression: str = "none"
    unit_bytes: int | None = None
    salvage: bool = False

    def to_dict(self) -> dict:
        own = {key: value for key, value in asdict(self).items() if key not in ("sentences", "hygiene")}
        if not self.salvage:  # unknown to sets of an earlier version
            del own["salvage"]
        level = {"zstd_level": ZSTD_LEVEL} if self.compression == "zstd" else {}
        versions = {"segmenter_version": SEGMENTER_VERSION}
        return self.sentences.to_dict() | versions | {"hygiene": self.hygiene.to_dict()} | own | level

"""One run of `data-prep shard`, as every process that takes part knows it: settings, input, units, places.

Made by `sharding.plan`; used by `units.py` (what a process does), `merging.py` (the end) and `progress.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.corpus.filters import Hygiene
from data_prep.corpus.inputs import InputFile, Piece
from data_prep.jobs.executor import Board
from data_prep.shards.layout import MANIFEST, SHARD_ENDINGS, UNFINISHED, ZSTD_LEVEL
from data_prep.shards.reader import ShardSet
from data_prep.text.segment_rules import VERSION as SEGMENTER_VERSION
from data_prep.text.sentences import SentenceSettings


@dataclass(frozen=True)
class ShardSettings:
    """What, beside input and tokenizer, decides the bytes of a shard set; `DIR/manifest.json` keeps it.

    shard_bytes: size of a shard's arrays at which the next one begins; shard_documents: likewise, 0 no limit.
    unit_bytes: text per unit of work, None to let the size of the input decide.
    """

    sentences: SentenceSettings
    hygiene: Hygiene = Hygiene()
    deduplicate: bool = False
    shard_bytes: int = 64_000_000
    shard_documents: int = 0
    compression: str = "none"
    unit_bytes: int | None = None

    def to_dict(self) -> dict:
        own = {key: value for key, value in asdict(self).items() if key not in ("sentences", "hygiene")}
        level = {"zstd_level": ZSTD_LEVEL} if self.compression == "zstd" else {}
        versions = {"segmenter_version": SEGMENTER_VERSION}
        return self.sentences.to_dict() | versions | {"hygiene": self.hygiene.to_dict()} | own | level


@dataclass(frozen=True)
class Job:
    """One run. `only`: the units to shard again, to mend a finished set; None: all of them, to make one."""

    output: Path
    settings: ShardSettings
    facts: dict  # the manifest's format version, settings and tokenizer
    files: list[InputFile]
    units: list[list[Piece]]
    not_read: list[str]
    only: tuple[int, ...] | None = None

    @property
    def work(self) -> Path:
        return self.output / UNFINISHED

    def unit_bytes(self, unit: int) -> int:
        """Bytes of input of a unit, as stored."""
        return sum(piece.size for piece in self.units[unit])

    def board(self) -> Board:
        """The state of the work."""
        if self.only is None:
            return Board(self.work, (self.output / MANIFEST).is_file)
        manifest = ShardSet.open(self.output).manifest
        return Board(self.work, lambda: not missing_units(self.output, manifest) & set(self.only))


def missing_units(output: Path, manifest: dict) -> set[int]:
    """The units of a finished set of which a shard, or its index, is not there."""
    return {
        entry["unit"]
        for entry in manifest["shards"]
        for key in SHARD_ENDINGS
        if not (output / entry[key]).is_file()
    }

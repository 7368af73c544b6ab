"""One run of `data-prep shard`, as all of its processes know it: settings, input, units, folders."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.corpus.filters import Filters
from data_prep.corpus.finding import Survey
from data_prep.corpus.inputs import InputFile, Piece
from data_prep.jobs.executor import WorkFolder
from data_prep.shards.layout import MANIFEST, SHARD_ENDINGS, UNFINISHED, ZSTD_LEVEL
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
    """

    sentences: SentenceSettings
    hygiene: Filters = Filters()
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
    """One run. `only`: the units to shard again when a finished set is repaired; None for all units."""

    output: Path
    settings: ShardSettings
    facts: dict  # the manifest's format version, settings and tokenizer
    found: Survey
    units: list[list[Piece]]
    only: tuple[int, ...] | None = None

    @property
    def files(self) -> list[InputFile]:
        return self.found.files

    @property
    def work(self) -> Path:
        return self.output / UNFINISHED

    def unit_bytes(self, unit: int) -> int:
        """Bytes of input of a unit, as stored."""
        return sum(piece.size for piece in self.units[unit])

    def work_folder(self) -> WorkFolder:
        """Locks and results of the run."""
        if self.only is None:
            return WorkFolder(self.work, (self.output / MANIFEST).is_file)
        manifest = ShardSet.open(self.output).manifest
        return WorkFolder(self.work, lambda: not missing_units(self.output, manifest) & set(self.only))


def missing_units(output: Path, manifest: dict) -> set[int]:
    """The units of a finished set with a missing shard or index."""
    return {
        entry["unit"]
        for entry in manifest["shards"]
        for key in SHARD_ENDINGS
        if not (output / entry[key]).is_file()
    }

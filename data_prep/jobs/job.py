"""One run of `data-prep shard`, as all of its processes know it: settings, input, units, folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.corpus.filters import ASKED_FOR, Filters
from data_prep.corpus.inputs import InputFile, Piece
from data_prep.jobs.executor import WorkFolder
from data_prep.shards.layout import MANIFEST, SHARD_ENDINGS, UNFINISHED, ZSTD_LEVEL
from data_prep.shards.reader import ShardSet
from data_prep.text.segment_rules import VERSION as SEGMENTER_VERSION
from data_prep.text.sentences import SentenceSettings

UNVERIFIED_TEXT = "its text has no checksum (`zstd --check` writes one)"
LEAST_RECORDS = 1000  # of a unit, before its share of rejected records can stop a run


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


class TooManyRejected(UserError):
    """More of the input is unusable than `Limits.max_rejected` allows."""


@dataclass(frozen=True)
class Limits:
    """When to stop a run for the state of its input; a set that passes has the same bytes without them.

    Args:
        strict: stop at damaged input, and at text without a checksum in a packed file.
        max_rejected: largest share of rejected records, of a unit of `LEAST_RECORDS` and of the whole set.
    """

    strict: bool = False
    max_rejected: float = 1.0

    def refuse(self, damaged: Sequence[dict], inputs: Sequence[dict], rejected: Mapping[str, int]) -> None:
        """Raises `UserError` when the limits forbid a set with these entries of its manifest."""
        for one in damaged:
            self.refuse_damage(one["file"], one["damage"])
        for one in inputs:
            self.refuse_damage(one["file"], UNVERIFIED_TEXT if one.get("unverified") else None)
        self.refuse_rejected(rejected, sum(one["documents"] for one in inputs), "the input")

    def refuse_damage(self, file: str, problem: str | None) -> None:
        """Raises `UserError` when there is a problem and `strict` forbids it."""
        if self.strict and problem:
            raise UserError(f"{file}: {problem}; --strict stops there")

    def refuse_rejected(self, rejected: Mapping[str, int], documents: int, where: str) -> None:
        """Raises `TooManyRejected` when too many records are unusable, apart from those filtered out."""
        unusable = {reason: n for reason, n in rejected.items() if not reason.startswith(ASKED_FOR)}
        count, records = sum(unusable.values()), documents + sum(rejected.values())
        if count > self.max_rejected * records:
            reasons = ", ".join(f"{n:,} × {reason}" for reason, n in sorted(unusable.items()))
            raise TooManyRejected(
                f"{where}: {count:,} of {records:,} records are rejected ({reasons}), a larger share than "
                f"--max-rejected {self.max_rejected:g}; mend the input, or allow more"
            )


@dataclass(frozen=True)
class Job:
    """One run. `only`: the units to shard again when a finished set is repaired; None for all units."""

    output: Path
    settings: ShardSettings
    facts: dict  # the manifest's format version, settings and tokenizer
    files: list[InputFile]
    units: list[list[Piece]]
    not_read: list[str]
    limits: Limits = Limits()
    only: tuple[int, ...] | None = None

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

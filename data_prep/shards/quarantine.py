"""The quarantine of a shard set: one line of JSON for each record, or part of a file, that is not in it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep.corpus.compression import Damage
from data_prep.corpus.documents import Reject
from data_prep.corpus.inputs import Piece

DAMAGED = "damaged input"  # the reason for a part that was left out


def rejected_line(piece: Piece, reject: Reject) -> bytes:
    """The line of one record. Its number counts from the start of the piece."""
    entry: dict = {"file": piece.file.name} | ({"member": reject.member} if reject.member else {})
    entry |= {"line": reject.line, "reason": reject.reason} | ({"of": reject.of} if reject.of else {})
    return json.dumps(entry).encode("ascii") + b"\n"


def damaged_line(piece: Piece, damage: Damage) -> bytes:
    """The line of a part of a file."""
    entry = {"file": piece.file.name, "offset": damage.start, "line": 0, "reason": DAMAGED}
    return json.dumps(entry).encode("ascii") + b"\n"


def join_quarantines(
    parts: Iterable[tuple[Path, list[Piece], list[dict]]], place: Path, heartbeat: Callable[[], None]
) -> None:
    """Write the units' quarantines, (file, pieces, records of the pieces), as one. Lines of a file that was
    read in pieces are numbered from its start."""
    before: Counter[str] = Counter()  # lines of a file, by path, in the pieces so far
    with open(place, "wb") as out:
        for path, pieces, records in parts:
            with open(path, "rb") as stream:
                for piece, read in zip(pieces, records, strict=True):
                    end = stream.tell() + read["quarantine_bytes"]
                    while stream.tell() < end:
                        line = stream.readline()
                        if before[piece.file.path]:
                            entry = json.loads(line)
                            entry["line"] += before[piece.file.path]
                            line = json.dumps(entry).encode("ascii") + b"\n"
                        out.write(line)
                    if piece.file.kind == "jsonl":
                        before[piece.file.path] += read["lines"]
            heartbeat()
        out.flush()
        os.fsync(out.fileno())

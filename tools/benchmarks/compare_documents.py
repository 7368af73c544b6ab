"""Near-duplicates and decontamination, measured on planted copies of real documents.

    python -m tools.benchmarks.compare_documents CORPUS... [--copies 300] [--output FILE]

CORPUS: files or folders as for `data-prep shard --input`. Near-duplicates: documents of 100 to 600 words, and
copies of some with 5, 10, 20 and 30 % of the words changed; `--near-duplicates 0.8` beside datasketch's
MinHash and LSH (pip install datasketch) on the same pairs of words and the same Jaccard index, one process.
MB/s: UTF-8 bytes per CPU-second. Memory: growth of the process while a million signatures are compared; of
datasketch, that of an index of 100,000, times ten.
Decontamination: 1,000 passages of 16 to 30 words, planted in other documents. Results: docs/inputs.md.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.environment import header, require_folder, write_result
from data_prep.common.errors import UserError, run_main
from data_prep.common.measuring import in_new_process, memory_field
from data_prep.corpus import near_duplicates
from data_prep.corpus.decontamination import SPAN, HeldOutSpans
from data_prep.corpus.documents import DocumentReader, RawDocument
from data_prep.corpus.finding import find_inputs
from data_prep.corpus.words import words_of

SIMILARITY = 0.8
CHANGES = (0.05, 0.1, 0.2, 0.3)
WORDS = (100, 600)
UNIT = 2000  # documents
PLANTED = 1000


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status."""
    return run_main("compare_documents", lambda: _run(argv))


def _run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="compare_documents", description=__doc__.split("\n")[0])
    parser.add_argument("corpus", nargs="+", help="as for data-prep shard --input")
    parser.add_argument(
        "--copies", type=int, default=300, metavar="N", help="for each share of changed words"
    )
    parser.add_argument("--output", metavar="FILE", help="write the result, with machine and versions")
    arguments = parser.parse_args(argv)
    require_folder(arguments.output)
    rng = random.Random(0)
    texts = list(_passages(arguments.corpus, rng))
    if len(texts) < 2 * arguments.copies:
        raise UserError(f"the corpus gives {len(texts)} passages; give at least {2 * arguments.copies}")
    copies, changed = _copies(texts, arguments.copies, rng)
    sides: dict[str, Callable[[list[str]], set[int]]] = {"ours": _ours, "datasketch": _datasketch}
    result = header(["rensa", "datasketch", "numpy"]) | {
        "similarity": SIMILARITY,
        "passages": len(texts),
        "copies": arguments.copies,
        "near_duplicates": {name: _judge(find, texts, copies, changed) for name, find in sides.items()},
        "memory_per_million": {
            "ours": in_new_process(_memory, 1_000_000),
            "datasketch": 10 * in_new_process(_memory_of_datasketch, 100_000),
        },
        "decontamination": _decontamination(texts, rng),
    }
    write_result(result, arguments.output)
    print(json.dumps(result, indent=1))


def _passages(corpus: list[str], rng: random.Random) -> list[str]:
    """Consecutive words of the corpus' documents; none is twice in the result."""
    found = []
    for file in find_inputs(corpus):
        for item in DocumentReader(file):
            words = item.content.split() if isinstance(item, RawDocument) else []
            while len(words) > WORDS[1]:
                size = rng.randint(*WORDS)
                found.append(" ".join(words[:size]))
                words = words[size:]
    return found


def _copies(texts: list[str], count: int, rng: random.Random) -> tuple[list[str], list[float]]:
    """Copies of some texts, and the share of words that is another one in each."""
    vocabulary = sorted({word for text in texts[:2000] for word in text.split()})
    copies, shares = [], []
    for share in CHANGES:
        for text in rng.sample(texts, count):
            words = text.split()
            for place in rng.sample(range(len(words)), round(share * len(words))):
                words[place] = rng.choice(vocabulary)
            copies.append(" ".join(words))
            shares.append(share)
    return copies, shares


def _judge(
    find: Callable[[list[str]], set[int]], texts: list[str], copies: list[str], changed: list[float]
) -> dict[str, Any]:
    started = time.process_time()
    dropped = find(texts + copies)
    seconds = time.process_time() - started
    size = sum(len(text.encode("utf-8")) for text in texts + copies)
    found = {
        str(share): float(np.mean([len(texts) + n in dropped for n, of in enumerate(changed) if of == share]))
        for share in CHANGES
    }
    wrong = sum(number < len(texts) for number in dropped)
    return {
        "found_by_changed_words": found,
        "originals_dropped": wrong,
        "precision": 1 - wrong / max(len(dropped), 1),
        "mb_per_cpu_second": size / 1e6 / seconds,
    }


def _ours(texts: list[str]) -> set[int]:
    with tempfile.TemporaryDirectory() as folder:
        units = []
        for start in range(0, len(texts), UNIT):
            signer = near_duplicates.Signer()
            for number, text in enumerate(texts[start : start + UNIT], start):
                signer.add(str(number), text)
            units.append(Path(folder) / str(start))
            units[-1].mkdir()
            signer.write(units[-1])
        found = near_duplicates.find(units, SIMILARITY)
        return {unit * UNIT + number for unit, numbers in enumerate(found) for number in numbers}


def _datasketch(texts: list[str]) -> set[int]:
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(near_duplicates.jaccard(SIMILARITY), num_perm=near_duplicates.VALUES)
    least = near_duplicates.jaccard(SIMILARITY)
    kept: dict[int, MinHash] = {}
    dropped = set()
    for number, text in enumerate(texts):
        words = words_of(text)
        sketch = MinHash(near_duplicates.VALUES, seed=1)
        sketch.update_batch([f"{a} {b}".encode() for a, b in zip(words, words[1:], strict=False)])
        if any(sketch.jaccard(kept[key]) >= least for key in lsh.query(sketch)):
            dropped.add(number)
        else:
            kept[number] = sketch
            lsh.insert(number, sketch)
    return dropped


def _memory(documents: int) -> int:
    """Bytes by which comparing random signatures makes the process grow."""
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder)
        rng = np.random.default_rng(0)
        values = rng.integers(0, 1 << 32, (documents, near_duplicates.VALUES), np.uint32)
        near_duplicates.write_signatures(unit, values)
        del values
        (unit / near_duplicates.IDS).write_text("\n".join(map(json.dumps, map(str, range(documents)))))
        before = memory_field("RssAnon")
        seen = [before]
        for _ in near_duplicates.find([unit], SIMILARITY, lambda: seen.append(memory_field("RssAnon"))):
            seen.append(memory_field("RssAnon"))
        return max(seen) - before


def _memory_of_datasketch(documents: int) -> int:
    """Bytes by which an index of random signatures makes the process grow."""
    from datasketch import MinHash, MinHashLSH

    rng = np.random.default_rng(0)
    lsh = MinHashLSH(near_duplicates.jaccard(SIMILARITY), num_perm=near_duplicates.VALUES)
    kept: dict[int, MinHash] = {}
    empty = MinHash(near_duplicates.VALUES)
    before = memory_field("RssAnon")
    for number in range(documents):
        kept[number] = empty.copy()
        kept[number].hashvalues = rng.integers(0, 1 << 32, near_duplicates.VALUES, np.uint64)
        lsh.insert(number, kept[number])
    return memory_field("RssAnon") - before


def _decontamination(texts: list[str], rng: random.Random) -> dict[str, Any]:
    """Passages of one half of the texts are planted in the other half."""
    half = len(texts) // 2
    passages: list[str] = []
    while len(passages) < PLANTED:
        words = rng.choice(texts[:half]).split()
        size = rng.randint(16, 30)
        start = rng.randrange(len(words) - size)
        if len(words_of(passage := " ".join(words[start : start + size]))) >= SPAN:
            passages.append(passage)
    spans = HeldOutSpans(passages)
    found = 0
    for passage in passages:
        host = rng.choice(texts[half:]).split()
        place = rng.randrange(len(host))
        found += spans.found_in(" ".join([*host[:place], passage.upper(), *host[place:]])) is not None
    started = time.process_time()
    shared = [span for text in texts[half:] if (span := spans.found_in(text))]
    seconds = time.process_time() - started
    size = sum(len(text.encode("utf-8")) for text in texts[half:])
    return {
        "planted": PLANTED,
        "found": found,
        "others": len(texts) - half,
        "others_dropped": len(shared),
        "others_share": shared[:5],
        "mb_per_cpu_second": size / 1e6 / seconds,
    }


if __name__ == "__main__":
    raise SystemExit(main())

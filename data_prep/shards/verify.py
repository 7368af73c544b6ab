"""`data-prep verify`: checks every byte of a shard folder, and names the input to read again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.common.errors import UserError, counted
from data_prep.common.files import file_sha256
from data_prep.corpus.documents import DocumentReader, RawDocument
from data_prep.corpus.filters import Filters
from data_prep.corpus.finding import find_inputs
from data_prep.corpus.inputs import Piece
from data_prep.corpus.verified import find_damage
from data_prep.shards.layout import (
    LENGTH_DTYPE,
    MANIFEST,
    SHARD_ENDINGS,
    Document,
    count_marks,
    hash64,
    index_totals,
    tar_members,
)
from data_prep.shards.reader import Shard, ShardSet

REMEDY = "restore it, or delete the whole folder and make the shards again"


def verify(folder: str | Path) -> dict:
    """Check every byte of a shard set: names, sha256, structure, and index against tar.

    Returns the checked counts. Raises `UserError` that names the first wrong file.
    """
    shards = ShardSet.open(folder)
    folder = shards.folder
    _check_names(shards)
    of_shards = {entry[key] for entry in shards.manifest["shards"] for key in SHARD_ENDINGS}
    for name, sha256 in shards.files().items():
        if name not in of_shards and file_sha256(folder / name) != sha256:
            raise UserError(f"{folder / name} has changed since it was written; {REMEDY}")
    byte_lengths = shards.tokenizer().byte_lengths
    totals = dict.fromkeys(shards.manifest["totals"], 0)
    marked: Counter[str] = Counter()
    for i, entry in enumerate(shards.manifest["shards"]):
        tar, index = folder / entry["file"], folder / entry["index"]
        remedy = _remedy(shards, entry)
        try:
            tar_members(tar)  # first: it distinguishes a truncated file from an altered one
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None
        for path, sha256 in ((tar, entry["sha256"]), (index, entry["index_sha256"])):
            if file_sha256(path) != sha256:
                raise UserError(f"{path} has changed since it was written (its sha256 differs); {remedy}")
        shard = shards.shard(i)
        _check_shard(shard, byte_lengths, shards.settings.max_tokens, remedy)
        for name, count in index_totals(shard.index).items():
            if count != entry[name]:
                raise UserError(f"{index} counts {count} {name}, the manifest {entry[name]}; {remedy}")
            totals[name] += count
        marked.update(count_marks(shard.index))
    if marked != Counter(shards.manifest.get("marked")):
        raise UserError(f"{folder / MANIFEST}: its counts of marked documents are not those of its shards")
    if totals != shards.manifest["totals"]:
        raise UserError(f"{folder / MANIFEST}: its totals are not the sums of its shards")
    return {"ok": True, "shards": len(shards), **totals, "fingerprint": shards.fingerprint}


def _remedy(shards: ShardSet, entry: dict) -> str:
    """Advice for a wrong shard, with the input it was made from."""
    if "split" in shards.manifest:
        return "make this part again with `data-prep split`"
    pieces = []
    for source in shards.manifest["inputs"]:
        for piece in source["pieces"]:
            if piece["unit"] == entry["unit"]:
                whole = len(source["pieces"]) == 1
                pieces.append(source["file"] + ("" if whole else f" [{piece['start']}:{piece['end']}]"))
    shown = ", ".join(pieces[:3]) + (f" and {len(pieces) - 3:,} more" if len(pieces) > 3 else "")
    return (
        f"it was made from {shown}: delete it and run the same `data-prep shard` again, "
        "which reads only that input again"
    )


def _check_names(shards: ShardSet) -> None:
    """Check that the folder has exactly the manifest's files."""
    expected = dict.fromkeys([MANIFEST, *shards.files()], REMEDY)
    for entry in shards.manifest["shards"]:
        # The remedy starts with "it was made from …: delete it and …"; there is nothing to delete here.
        remedy = _remedy(shards, entry).replace("delete it and run", "run")
        expected |= {entry["file"]: remedy, entry["index"]: remedy}
    found = {p.relative_to(shards.folder).as_posix() for p in shards.folder.rglob("*") if not p.is_dir()}
    for name in sorted(expected.keys() - found):
        raise UserError(f"{shards.folder / name} is missing; {expected[name]}")
    for name in sorted(found - expected.keys()):
        raise UserError(f"{shards.folder / name} does not belong to this shard set; move it away")


def _check_shard(shard: Shard, byte_lengths: np.ndarray, max_tokens: int, remedy: str) -> None:
    """Compare the tar's arrays with the index, group by group."""

    def require(condition: bool | np.bool_, problem: str) -> None:
        if not condition:
            raise UserError(f"{shard.path}: {problem}; {remedy}")

    index = shard.index
    groups = int(index["group"].max()) + 1 if index.size else 0
    require(shard.groups == groups, "index and tar differ in groups")
    # Rows of each group, without a search through the whole index.
    first = np.searchsorted(index["group"], np.arange(groups + 1))
    require(bool((np.diff(index["group"].astype(np.int64)) >= 0).all()), "the index is out of order")
    for g in range(groups):
        tokens, lengths, sizes, facts = shard.group(g)
        rows = np.arange(first[g], first[g + 1])
        mine = index[rows]
        require(len(facts) == rows.size == sizes.size, f"group {g} differs in its number of documents")
        require((mine["row"] == np.arange(rows.size)).all(), f"group {g} is out of order in the index")
        require((mine["sentences"] == sizes).all(), f"group {g} differs in sentences per document")
        require(lengths.dtype == LENGTH_DTYPE and lengths.size == sizes.sum(), "sentences are missing")
        require(tokens.size == lengths.sum(dtype=np.int64), "sentence lengths do not add up to the tokens")
        require(bool(lengths.min() >= 1 and lengths.max() <= max_tokens), "a sentence is empty or too long")
        require(bool(tokens.max() < byte_lengths.size), "a token id lies outside the vocabulary")
        spans = np.append(0, np.cumsum(mine["tokens"], dtype=np.int64))
        require(spans[-1] == tokens.size, f"group {g} differs in tokens per document")
        texts = np.append(0, np.cumsum(byte_lengths[tokens], dtype=np.int64))
        require((np.diff(texts[spans]) == mine["bytes"]).all(), "tokens do not add up to the text's bytes")
        keys = [hash64(fact["id"].encode("utf-8")) for fact in facts]
        require(bool((mine["key_hash"] == np.array(keys, np.uint64)).all()), "a key hash is not its id's")
        for n, start, row in zip(rows, spans[:-1], mine, strict=True):
            same = np.array_equal(shard.tokens(n), tokens[start : start + row["tokens"]])
            require(same, f"the index points to the wrong place for document {n}")
        stored = np.concatenate([shard.sentence_lengths(n) for n in rows])
        require(np.array_equal(stored, lengths), "the index points to the wrong sentence lengths")


def verify_deep(folder: str | Path, inputs: list[str] | None = None) -> dict:
    """Decode every document and compare its text's hash; check sentences (valid UTF-8) and the segmenter.

    With `inputs`, every text is also compared with the input's, in order, and only rejected ones may be
    missing.

    Returns:
        {"decoded": documents, "compared": documents compared with the input}

    Raises:
        UserError: names the first wrong document.
    """
    shards = ShardSet.open(folder)
    tokenizer = shards.tokenizer()
    originals = _originals(shards, inputs) if inputs else None
    decoded = compared = 0
    for document in shards.documents():
        data = tokenizer.decode_bytes(document.tokens)
        where = f"{shards.folder}: document {decoded} ({document.id!r})"
        if hash64(data) != document.text_hash:
            raise UserError(f"{where}: its tokens do not give the text that was sharded; {REMEDY}")
        text = data.decode("utf-8")
        try:
            sentences = [tokenizer.decode_bytes(tokens).decode("utf-8") for tokens in document.sentences()]
        except UnicodeDecodeError:
            raise UserError(f"{where}: a sentence ends inside a character; {REMEDY}") from None
        if "".join(sentences) != text:
            raise UserError(f"{where}: its sentences do not join to its text; {REMEDY}")
        if "".join(shards.settings.segmenter_for(document.language)(text)) != text:
            raise UserError(f"{where}: the segmenter loses text; this is a bug, please report it")
        decoded += 1
        if originals is not None:
            _compare(document, text, originals, where)
            compared += 1
    if originals is not None:
        for _ in originals:  # the rest of the input was rejected, or counts differ
            pass
    return {"decoded": decoded, "compared": compared}


def _originals(shards: ShardSet, inputs: list[str]) -> Iterator[RawDocument]:
    """The input's good documents, in order. Raises at the end when the set does not account for all."""
    settings = shards.manifest["settings"]
    files = find_inputs(inputs, shards.folder)
    entries = shards.manifest["inputs"]
    found = [(file.name, file.size) for file in files]
    if found != [(entry["file"], entry["size"]) for entry in entries]:
        raise UserError(f"{shards.folder} was made from other files than {', '.join(map(str, inputs))}")
    places = [
        (piece["unit"], n, piece["start"], piece["end"])
        for n, entry in enumerate(entries)
        for piece in entry["pieces"]
    ]
    good = 0
    filters = Filters.from_dict(settings["hygiene"])
    for _, n, start, end in sorted(places):
        piece = Piece(files[n], start, end)
        arguments = settings["language"], filters, find_damage(piece), settings.get("salvage", False)
        for item in DocumentReader(piece, *arguments):
            if isinstance(item, RawDocument):
                good += 1
                yield item
    rejected = shards.manifest["rejected"]
    explained = shards.manifest["totals"]["documents"] + sum(
        rejected.get(reason, 0) for reason in ("duplicate", "tokenizer loses text")
    )
    if good != explained:
        raise UserError(
            f"{shards.folder}: the input has {counted(good, 'good document')}, the shards explain "
            f"{explained:,}; {REMEDY}"
        )


def _compare(document: Document, text: str, originals: Iterator[RawDocument], where: str) -> None:
    for original in originals:
        if original.id == document.id and original.content == text:
            if (original.language, original.source) != (document.language, document.source):
                raise UserError(f"{where}: language or source differ from the input's; {REMEDY}")
            if original.mark != document.mark:
                raise UserError(f"{where}: it is marked wrongly, or the input was damaged since; {REMEDY}")
            return
    raise UserError(f"{where} is not in the input, or not in this place; {REMEDY}")

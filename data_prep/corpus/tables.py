"""The rows of tables: parquet and arrow files, datasets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.common.errors import UserError, first_line
from data_prep.corpus.compression import Damage
from data_prep.corpus.filters import TEXT_FIELDS, Filters
from data_prep.corpus.inputs import (
    ROWS,
    DamagedTable,
    Piece,
    damaged_tables,
    dataset_batches,
    hash_range,
    hash_row_groups,
    hash_rows,
    open_dataset,
    open_input,
    open_parquet,
    records,
    user_errors,
)

BATCH_BYTES = 4 << 20  # approximate size of a batch of a parquet file


class Rows:
    """The rows of a piece of a table, as (number from 1, record or None, shard of a stream); iterate once.

    Attributes:
        bytes_read: stored bytes read so far.
        filters: with the text's column, once a row was read.

    Args:
        digest: the hash to feed.
        damage: where to add what could not be read.
    """

    def __init__(self, piece: Piece, filters: Filters, digest: Any, damage: list[Damage]):
        self.piece, self.file, self.filters = piece, piece.file, filters
        self.bytes_read = 0
        self._hash, self._damage = digest, damage
        self._columns: list[str] | None = None

    def __iter__(self) -> Iterator[tuple[int, dict | None, int | None]]:
        batches = {"parquet": self._parquet, "arrow": self._arrow, "dataset": self._dataset}[self.file.kind]
        try:
            for shard, first, batch in batches():
                for number, record in enumerate(records(batch), start=first + 1):
                    yield number, record and _decoded(record), shard
        except DamagedTable as error:
            self._damage.append(Damage(str(error), 0, self.file.size))
            self.bytes_read = self.file.size

    def _choose(self, schema) -> list[str]:
        """The columns to read, found at the first batch. Raises `UserError` when the text's is ambiguous."""
        if self._columns is None:
            strings = [one.name for one in schema if _is_text(one.type)]
            strings = strings or [one.name for one in schema if _is_bytes(one.type)]
            self.filters = with_text_column(self.file.path, schema.names, strings, self.filters)
            wanted = self.filters.fields()
            self._columns = [name for name in schema.names if name in wanted]
        return self._columns

    def _parquet(self) -> Iterator[tuple[None, int, Any]]:
        with open_parquet(self.file, self._hash) as table:
            facts = table.metadata
            columns = self._choose(table.schema_arrow)
            first = sum(facts.row_group(n).num_rows for n in range(self.piece.start))
            with user_errors(self.file.path):
                hash_row_groups(self._hash, self.piece, facts)
            for group in range(self.piece.start, self.piece.end):
                number = first
                for batch in self.batches(table, group, columns):
                    yield None, number, batch
                    number += batch.num_rows
                first += facts.row_group(group).num_rows
                size, groups = self.file.size, facts.num_row_groups
                self.bytes_read += size * (group + 1) // groups - size * group // groups

    def batches(self, table, group: int, columns: list[str]) -> Iterator[Any]:
        """One row group of a parquet file in small batches; a damaged one up to the damage."""
        import pyarrow

        facts = table.metadata.row_group(group)
        rows = BATCH_BYTES * facts.num_rows // max(facts.total_byte_size, 1)
        with user_errors(self.file.path):
            try:
                yield from table.iter_batches(min(max(rows, 1), ROWS), row_groups=[group], columns=columns)
            except (pyarrow.ArrowException, OSError) as error:
                # A failing disk or network is not damage: the next run may read it all.
                if getattr(error, "errno", None) is not None or "://" in self.file.path:
                    raise
                place = facts.column(0).data_page_offset
                reason = f"damaged row group {group}: {first_line(error)}"
                self._damage.append(Damage(reason, place, place + facts.total_byte_size))

    def _arrow(self) -> Iterator[tuple[None, int, Any]]:
        """An arrow file, as feather writes it, or a stream, as `datasets` does."""
        import pyarrow

        with open_input(self.file) as stored, user_errors(self.file.path):
            hash_range(self._hash, stored, 0, self.file.size)
            stored.seek(0)
            is_file = stored.read(6) == b"ARROW1"
            stored.seek(0)
            with damaged_tables(self.file):
                if not is_file and stored.read(4) not in (b"\xff\xff\xff\xff", b""):  # a stream of messages
                    raise pyarrow.ArrowInvalid("unknown first bytes")
                stored.seek(0)
                table = pyarrow.ipc.open_file(stored) if is_file else pyarrow.ipc.open_stream(stored)
            columns = self._choose(table.schema)
            batches = iter(map(table.get_batch, range(table.num_record_batches)) if is_file else table)
            first = 0
            while True:
                with damaged_tables(self.file):
                    batch = next(batches, None)
                if batch is None:
                    break
                for at in range(0, batch.num_rows, ROWS):
                    yield None, first + at, batch.select(columns).slice(at, ROWS)
                first += batch.num_rows
                self.bytes_read = min(self.bytes_read + batch.nbytes, self.file.size)
        self.bytes_read = self.file.size

    def _dataset(self) -> Iterator[tuple[int | None, int, Any]]:
        table, size = open_dataset(self.file.path), self.file.size
        with user_errors(self.file.path):
            for shard, first, batch in dataset_batches(self.piece):
                hash_rows(self._hash, batch)
                yield shard, first, batch.select(self._choose(batch.schema))
                if shard is None:
                    count = len(table)
                    self.bytes_read += size * (first + batch.num_rows) // count - size * first // count


def with_text_column(path: str, names: Sequence[str], strings: Sequence[str], rules: Filters) -> Filters:
    """The filters for a table with these columns.

    Args:
        strings: the columns that may hold text.

    Raises:
        UserError: the text's column is ambiguous or missing.
    """
    if rules.text_field is None and not set(TEXT_FIELDS) & set(names):
        strings = [name for name in strings if name not in ("id", "language")]
        if len(strings) != 1:
            raise UserError(
                f"{path} does not tell which column holds the text "
                f"(it has {', '.join(names) or 'none'}); name it with --text-field"
            )
        rules = dataclasses.replace(rules, text_field=strings[0])
    if rules.text_field and not {rules.text_field, rules.text_field.split(".")[0]} & set(names):
        raise UserError(
            f"{path} has no column {rules.text_field}; --text-field can name one of {', '.join(names)}"
        )
    return rules


def _decoded(record: dict) -> dict:
    """Columns of bytes as text, where they are UTF-8: many writers leave out the mark of a string."""
    for name, value in record.items():
        if isinstance(value, bytes):
            try:
                record[name] = value.decode("utf-8")
            except UnicodeDecodeError:
                pass
    return record


def _is_text(kind) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

"""The process that reads Parquet files, for `parquet.file`. It has one file open at a time."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from qembed.child.worker import NO_MEMORY, requests

BATCH, END, DESCRIBED, LARGE_ROW, DAMAGED, SYSTEM = b"B", b"Z", b"D", b"L", b"X", b"S"
LARGEST_BATCH = 2**26
"""Bytes of a batch; one with more is sent in pieces, and one row with more is not sent."""
MOST_VALUES = 2**20
"""Values of a column of a batch, those in lists included: each becomes a Python object of up to 100 bytes."""
BUFFER_BYTES = 2**20


class Reader:
    """A Parquet file that is read in batches."""

    def __init__(self, path: str, texts_as_dictionary: bool) -> None:
        import pyarrow.parquet as parquet

        options = {"buffer_size": BUFFER_BYTES, "pre_buffer": False}
        self._file = parquet.ParquetFile(path, **options)
        # A page of a few bytes may stand for a thousand times the same long text: as a dictionary it stays one text.
        texts = [field.name for field in self._file.schema_arrow if texts_as_dictionary and _is_text(field.type)]
        if texts:
            self._file.close()
            self._file = parquet.ParquetFile(path, read_dictionary=texts, **options)
        self._batches: Iterator[Any] = iter(())

    def described(self) -> bytes:
        """Rows, the Arrow schema, columns of UUIDs, and rows and bytes by column of each row group, as JSON."""
        metadata, schema = self._file.metadata, self._file.schema
        groups = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            sizes: dict[str, int] = {}
            for column in map(group.column, range(group.num_columns)):
                name = column.path_in_schema.partition(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_uncompressed_size
            groups.append([group.num_rows, sizes])
        uuids = [column.path for column in map(schema.column, range(len(schema))) if str(column.logical_type) == "UUID"]
        arrow_schema = base64.b64encode(self._file.schema_arrow.serialize()).decode()
        return json.dumps([metadata.num_rows, arrow_schema, uuids, groups]).encode()

    def begin(self, columns: list[str], rows: int) -> None:
        """Begin to read `columns` from the first row, in batches of about `rows`."""
        whole = self._file.iter_batches(batch_size=rows, columns=columns, use_threads=False)
        self._batches = (piece for batch in whole for piece in pieces(batch))

    def next(self) -> tuple[bytes, bytes]:
        """The next batch in Arrow's stream format."""
        batch = next(self._batches, None)
        if batch is None:
            return END, b""
        return (LARGE_ROW, b"") if _is_too_large(batch) else (BATCH, _stream(batch))

    def take(self, group: int, columns: list[str], rows: list[int]) -> tuple[bytes, bytes]:
        """Some rows of a row group, by their number in it."""
        import pyarrow as arrow

        table = self._file.read_row_group(group, columns=columns, use_threads=False).take(rows).combine_chunks()
        batches = table.to_batches() or [arrow.RecordBatch.from_pylist([], schema=table.schema)]
        return (LARGE_ROW, b"") if _is_too_large(batches[0]) else (BATCH, _stream(batches[0]))


def pieces(batch: Any) -> Iterator[Any]:
    """A batch in pieces of at most LARGEST_BATCH bytes and MOST_VALUES values, or of one row."""
    if _is_too_large(batch):
        batch = _compact(batch)
    if batch.num_rows <= 1 or not _is_too_large(batch):
        yield batch
        return
    half = batch.num_rows // 2
    for piece in (batch.slice(0, half), batch.slice(half)):
        yield from pieces(piece)


def _is_too_large(batch: Any) -> bool:
    return batch.nbytes > LARGEST_BATCH or any(_values(column) > MOST_VALUES for column in batch.columns)


def _values(column: Any) -> int:
    """The number of values of an Arrow array, those inside lists and structs included."""
    import pyarrow as arrow

    kind = column.type
    if arrow.types.is_struct(kind):
        return len(column) + sum(map(_values, column.flatten()))
    if arrow.types.is_map(kind):
        return len(column) + _values(column.keys) + _values(column.items)
    if arrow.types.is_nested(kind) and hasattr(column, "flatten"):
        return len(column) + _values(column.flatten())
    return len(column)


def _compact(batch: Any) -> Any:
    """A copy without the values that are in no row, which slices and dictionaries keep."""
    import pyarrow as arrow

    part = batch.take(arrow.array(range(batch.num_rows), arrow.int64()))
    columns = [
        column.dictionary_decode().dictionary_encode() if arrow.types.is_dictionary(column.type) else column
        for column in part.columns
    ]
    return arrow.RecordBatch.from_arrays(columns, names=part.schema.names)


def _stream(batch: Any) -> bytes:
    import pyarrow as arrow

    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _is_text(kind: Any) -> bool:
    import pyarrow as arrow

    return any(check(kind) for check in (arrow.types.is_string, arrow.types.is_binary))


def main() -> None:
    """Answer requests until stdin ends: "open", "begin", "next" and "take", with their arguments as a JSON list."""
    import pyarrow

    pyarrow.set_cpu_count(1)
    reader: Reader | None = None
    for (kind, content), respond in requests():
        arguments = json.loads(content)
        status, rest = DESCRIBED, b""
        try:
            if kind == "open":
                reader = None
                reader = Reader(*arguments)
                rest = reader.described()
            elif kind == "begin":
                assert reader is not None
                reader.begin(*arguments)
            else:
                assert reader is not None
                status, rest = reader.next() if kind == "next" else reader.take(*arguments)
        except MemoryError:
            status, rest = NO_MEMORY, b""
        except OSError as error:
            if error.errno:
                status, rest = SYSTEM, str(error.errno).encode()
            else:
                status, rest = DAMAGED, str(error).encode(errors="replace")
        except Exception as error:  # noqa: BLE001 - a damaged file can raise anything
            status, rest = DAMAGED, f"{error or type(error).__name__}".encode(errors="replace")
        respond(status, rest)


if __name__ == "__main__":
    main()

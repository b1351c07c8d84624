"""Tables of Parquet, CSV and Arrow files, read in partitions."""

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from clm_dist.config.data import DataConfig
from clm_dist.errors import DataError, first_line
from clm_dist.prepare.data_file import DataFile, is_url
from clm_dist.prepare.fields import check_fields, select_fields
from clm_dist.prepare.partition import Partition

# pyarrow refuses a record of a CSV file that is larger.
_CSV_BLOCK = 1 << 26
_DELIMITERS = ";|\t,"
_HEAD_BYTES = 1 << 16


def parquet_partitions(file: DataFile, data: DataConfig, size: int) -> Iterator[Partition]:
    """Neighbouring row groups that hold about `size` bytes; from a file whose row groups are large, batches of rows."""
    with pa.parquet.ParquetFile(file.open()) as opened:
        if not opened.metadata.num_rows:
            return
        columns = check_fields(opened.schema_arrow, data, file.name)
        metadata = opened.metadata
        sizes = [_bytes_of(metadata.row_group(i), columns) for i in range(metadata.num_row_groups)]
        if max(sizes) > 4 * size:
            rows = max(1, metadata.num_rows * size // sum(sizes))
            batches = (
                select_fields(pa.Table.from_batches([batch]), data, file.name)
                for batch in opened.iter_batches(rows, columns=columns)
            )
            yield from table_partitions(batches, file.name, size)
            return
        start = held = 0
        for stop, group in enumerate(sizes, 1):
            held += group
            if held >= size or stop == len(sizes):
                yield Partition(file.name, held, file, start, stop)
                start, held = stop, 0


def _bytes_of(row_group: Any, columns: list[str]) -> int:
    """Uncompressed bytes of some columns of a row group."""
    described = (row_group.column(i) for i in range(row_group.num_columns))
    prefixes = tuple(f"{column}." for column in columns)
    return sum(c.total_uncompressed_size for c in described if f"{c.path_in_schema}.".startswith(prefixes)) or 1


def csv_batches(file: DataFile, data: DataConfig) -> Iterator[pa.Table]:
    delimiter = data.delimiter or ("\t" if ".tsv" in file.suffixes else ",")
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    read = pa.csv.ReadOptions(block_size=_CSV_BLOCK)
    try:
        with file.stream() as stream, pa.csv.open_csv(stream, read, parse) as opened:
            names = opened.schema.names
        # A CSV file knows no types: what is text is what the job reads as text, and the rest is not read at all.
        types = pa.schema([(name, pa.float64() if name == data.score else pa.large_string()) for name in names])
        columns = check_fields(types, data, file.name)
    except (pa.ArrowInvalid, DataError) as error:
        if first_line(error) == "Empty CSV file":
            return
        line = _first_line(file)
        if for_excel := re.fullmatch("\ufeff?sep=(.)", line.rstrip("\r")):
            raise DataError(
                f"{file.name}: its first line, sep={for_excel[1]}, is for Excel, and no record; take that line out, "
                f"and set data.delimiter to {for_excel[1]!r}",
                field="data.delimiter",
            ) from None
        other = None if delimiter in line else next((other for other in _DELIMITERS if other in line), None)
        if other is None:
            raise
        problem = str(error) if isinstance(error, DataError) else f"{file.name}: cannot be read: {first_line(error)}"
        raise DataError(
            f"{problem}; {other!r} is between its fields, it seems: set data.delimiter to it",
            field=getattr(error, "field", "data.path"),
        ) from None
    convert = pa.csv.ConvertOptions(
        include_columns=columns,
        column_types={column: types.field(column).type for column in columns},
        strings_can_be_null=False,
    )
    with file.stream() as stream, pa.csv.open_csv(stream, read, parse, convert) as opened:
        for batch in opened:
            yield select_fields(pa.Table.from_batches([batch]), data, file.name)


def _first_line(file: DataFile) -> str:
    with file.stream() as stream:
        head: bytes = stream.read(_HEAD_BYTES)
    return head.partition(b"\n")[0].decode(errors="replace")


def arrow_batches(file: DataFile, data: DataConfig) -> Iterator[pa.Table]:
    def opened() -> pa.NativeFile:
        return file.open() if is_url(file.name) else pa.memory_map(file.name)

    try:
        reader = pa.ipc.open_file(opened())
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        reader = pa.ipc.open_stream(opened())
        batches = iter(reader)
    for batch in batches:
        if batch.num_rows:
            yield select_fields(pa.Table.from_batches([batch]), data, file.name)


def table_partitions(tables: Iterator[pa.Table], where: str, size: int) -> Iterator[Partition]:
    """Partitions of about `size` bytes from tables of any size."""
    waiting: list[pa.Table] = []
    held = 0
    for table in tables:
        rows = max(1, len(table) * size // max(table.nbytes, 1))
        for start in range(0, len(table), rows):
            piece = table.slice(start, rows)
            waiting.append(piece)
            held += piece.nbytes
            if held >= size:
                yield Partition(where, held, content=_compact(waiting))
                waiting, held = [], 0
    if waiting:
        yield Partition(where, held, content=_compact(waiting))


def _compact(tables: list[pa.Table]) -> pa.Table:
    """The tables as one, in memory of its own: a slice sent to another process would take the whole with it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    with pa.ipc.open_stream(sink.getvalue()) as reader:
        return reader.read_all()


def checked(table: pa.Table) -> pa.Table:
    """The table, whose strings and names are UTF-8: not every reader looks."""
    table.validate(full=True)
    _ = table.column_names
    return table

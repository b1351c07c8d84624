"""The files that `data.path` names, local or remote, cut into partitions.

A partition is what one task holds in memory. Lines of a file that is not compressed and the row groups of a Parquet
file are read by the tasks themselves; everything else can only be read from its beginning, so the process that hands
out the tasks reads it once and gives each task its content. Where each file is a record, a task reads several. How
files are cut depends on their bytes alone, not on how many tasks there are.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from clm_dist.config.data import DataConfig
from clm_dist.prepare.cuts import Unit
from clm_dist.prepare.data_file import DataFile, reading
from clm_dist.prepare.fields import check_fields, select_fields
from clm_dist.prepare.json_files import advising, is_one_value, list_partitions
from clm_dist.prepare.json_lines import check_encoding, text_schema
from clm_dist.prepare.lines import (
    line_partitions,
    lines_between,
    numbered,
    numbered_line,
    read_json_lines,
)
from clm_dist.prepare.partition import Partition
from clm_dist.prepare.tables import arrow_batches, checked, csv_batches, parquet_partitions, table_partitions
from clm_dist.prepare.text import file_partitions, read_files, read_text

PROBE_BYTES = 1 << 20
"""Size of partitions that are read to see what a source is like."""
_SNIFFED_BYTES = 1 << 12


def all_partitions(
    files: Sequence[DataFile], data: DataConfig, size: int, schema: pa.Schema | None
) -> Iterator[Partition]:
    """The partitions of all files, see `partitions_of`."""
    if data.records == "file":
        yield from file_partitions(files, size)
        return
    for file in files:
        yield from partitions_of(file, data, size, schema)


def _unit_of(data: DataConfig) -> Unit:
    return "paragraph" if data.records == "paragraph" else "line"


def partitions_of(file: DataFile, data: DataConfig, size: int, schema: pa.Schema | None) -> Iterator[Partition]:
    """A file's partitions of about `size` bytes, in order.

    Args:
        schema: types of the fields that the job reads, for JSON.

    Raises:
        DataError: the file is broken or lacks a field; the message names it and, where it can, the line.
    """
    with reading(file):
        if file.kind in ("json", "text", "csv") and not file.is_web:
            with file.stream() as stream:
                check_encoding(stream.read(_SNIFFED_BYTES), file.name, file.encoding)
        match file.kind:
            case "json" | "text":
                if is_one_value(file, data):
                    yield from list_partitions(file, data, size, schema)
                elif file.is_stream:
                    yield from line_partitions(file, size, schema, _unit_of(data))
                else:
                    for start in range(0, file.size, size):
                        stop = min(start + size, file.size)
                        yield Partition(file.name, stop - start, file, start, stop, schema=schema)
            case "parquet":
                yield from parquet_partitions(file, data, size)
            case "csv":
                yield from table_partitions(csv_batches(file, data), file.name, size)
            case "arrow":
                yield from table_partitions(arrow_batches(file, data), file.name, size)


def read_partition(partition: Partition, data: DataConfig) -> pa.Table:
    """A partition's records, with the columns that the job reads.

    Raises:
        DataError: a record is broken, not UTF-8, or of another type than the records before; the message names it.
    """
    if isinstance(partition.content, pa.Table):
        return checked(partition.content)
    if partition.files:
        return select_fields(read_files(partition.files), data, partition.where)
    file = partition.file
    assert file is not None
    with reading(file):
        if file.kind == "parquet":
            with pa.parquet.ParquetFile(file.open()) as opened:
                columns = check_fields(opened.schema_arrow, data, file.name)
                groups = list(range(partition.start, partition.stop))
                return checked(select_fields(opened.read_row_groups(groups, columns), data, file.name))
        unit = _unit_of(data)
        lines = partition.content if partition.content is not None else lines_between(file, partition, unit)
        if partition.start == 0 and partition.first == 1 and lines[:3].to_pybytes() == b"\xef\xbb\xbf":
            lines = lines[3:]
        if file.kind == "text":
            table = read_text(lines, file, unit, lambda number: numbered_line(partition, number, unit))
            return select_fields(table, data, file.name)
        if partition.start or partition.first > 1:
            return select_fields(read_json_lines(lines, partition), data, file.name)
        with advising(file, data):
            # Parsing takes a field that is not there for null, record by record.
            text_schema(numbered(lines, partition), data)
            return select_fields(read_json_lines(lines, partition), data, file.name)


def infer_schema(file: DataFile, data: DataConfig) -> pa.Schema | None:
    """Types of the fields that the job reads in a file of JSON; None where the file has no records to tell.

    Raises:
        DataError: no record has such a field; or a record is broken.
    """
    for partition in partitions_of(file, data, PROBE_BYTES, pa.schema([])):
        with reading(file):
            lines = partition.content if partition.content is not None else lines_between(file, partition)
        with advising(file, data):
            schema = text_schema(numbered(lines, partition), data)
        if schema is not None:
            return schema
    return None

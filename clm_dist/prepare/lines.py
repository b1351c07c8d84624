"""Lines of text and of JSON, read in partitions."""

from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from clm_dist.errors import DataError, first_line
from clm_dist.prepare.cuts import Unit, last_cut, stretch_of
from clm_dist.prepare.data_file import DataFile, is_url
from clm_dist.prepare.json_lines import Lines, broken_record
from clm_dist.prepare.partition import Partition
from clm_dist.prepare.tables import checked
from clm_dist.prepare.text import without_marks

# pyarrow parses a piece as one block, and its blocks end below 2 GiB.
_MAX_JSON_BLOCK = 2**31 - 1


def lines_between(file: DataFile, partition: Partition, unit: Unit = "line") -> pa.Buffer:
    """The lines or paragraphs of a file that count for a partition; of a local file they are mapped, not copied."""
    with file.open() if is_url(file.name) else pa.memory_map(file.name) as opened:
        begin, end = stretch_of(opened, partition.start, partition.stop, unit)
        opened.seek(begin)
        return opened.read_buffer(end - begin)


def line_partitions(file: DataFile, size: int, schema: pa.Schema | None, unit: Unit = "line") -> Iterator[Partition]:
    """Whole lines or paragraphs of a file that can only be read from its beginning."""
    first, consumed = 1, 0
    with file.open() as opened:
        stream = file.content_of(opened)
        rest = b""
        while True:
            chunk = stream.read(size)
            known = max(0, rest.rfind(b"\n"))
            rest += chunk
            end = last_cut(rest, unit, known) if chunk else len(rest)
            if chunk and not end:
                continue
            content, rest = rest[:end], rest[end:]
            if content:
                consumed, before = opened.tell(), consumed
                yield Partition(
                    file.name, consumed - before, file, content=pa.py_buffer(content), first=first, schema=schema
                )
                first += content.count(b"\n")
            if not chunk:
                return


def numbered_line(partition: Partition, number: int, unit: Unit) -> str:
    """A line of a partition, by its number from 1, as messages name it."""
    return f"{partition.where}:{_first_line_number(partition, unit) + number - 1}"


def read_json_lines(lines: pa.Buffer, partition: Partition) -> pa.Table:
    assert partition.schema is not None
    empty = partition.schema.empty_table()
    if lines.size > _MAX_JSON_BLOCK:
        raise DataError(f"{partition.where}: a record of {lines.size:,} bytes is too large; cut it", field="data.path")
    try:
        return checked(
            pa.json.read_json(
                pa.BufferReader(lines),
                read_options=pa.json.ReadOptions(block_size=max(lines.size, 1), use_threads=False),
                parse_options=pa.json.ParseOptions(
                    explicit_schema=partition.schema, unexpected_field_behavior="ignore"
                ),
            )
        )
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        if first_line(error) == "Empty JSON file":
            return empty
        content = lines.to_pybytes()
        if (whole := without_marks(content)) != content:
            return read_json_lines(pa.py_buffer(whole), partition)
        raise broken_record(numbered(lines, partition), partition.schema) or error from None


def numbered(lines: pa.Buffer, partition: Partition) -> Lines:
    return Lines(lines.to_pybytes(), partition.where, partition.unit, partial(_first_line_number, partition))


def _first_line_number(partition: Partition, unit: Unit = "line") -> int:
    """The number of a partition's first line; counts the lines before it, so only errors ask for it."""
    if partition.content is not None or partition.start == 0:
        return partition.first
    assert partition.file is not None
    number = 1
    with partition.file.open() as opened:
        left, _ = stretch_of(opened, partition.start, partition.stop, unit)
        opened.seek(0)
        while left:
            chunk = opened.read(min(left, 1 << 24))
            number += chunk.count(b"\n")
            left -= len(chunk)
    return number

"""Lines of text and of JSON, read in partitions."""

import codecs
import json
from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from clm_dist.errors import DataError, first_line
from clm_dist.prepare.files import DataFile, is_url
from clm_dist.prepare.json_lines import Lines, broken_record, check_encoding, first_line_not_utf8, not_utf8
from clm_dist.prepare.partition import Partition
from clm_dist.prepare.tables import checked

# pyarrow parses a piece as one block, and its blocks end below 2 GiB.
_MAX_JSON_BLOCK = 2**31 - 1
_READ_AHEAD = 1 << 16


def lines_between(file: DataFile, partition: Partition) -> pa.Buffer:
    """The lines that begin at the bytes [start, stop) of a file; of a local one they are mapped, not copied."""
    # The byte before says whether a line begins here, or one goes on that began in the partition before.
    begin = max(partition.start - 1, 0)
    with file.open() if is_url(file.name) else pa.memory_map(file.name) as opened:

        def to_line_end(place: int) -> int:
            """Where the line ends that the byte at `place` is in."""
            opened.seek(place)
            while chunk := opened.read(_READ_AHEAD):
                end = chunk.find(b"\n") + 1
                place += end or len(chunk)
                if end:
                    break
            return place

        start = to_line_end(begin) if partition.start else 0
        if start >= partition.stop:
            return pa.py_buffer(b"")
        stop = to_line_end(partition.stop - 1)
        opened.seek(start)
        return opened.read_buffer(stop - start)


def line_partitions(file: DataFile, size: int, schema: pa.Schema | None) -> Iterator[Partition]:
    """Whole lines of a file that can only be read from its beginning."""
    first, consumed = 1, 0
    with file.open() as opened:
        stream = file.decompressed(opened)
        rest = b""
        while True:
            chunk = stream.read(size)
            end = chunk.rfind(b"\n") + 1 if chunk else 0
            if chunk and not end:
                rest += chunk
                continue
            content = rest + chunk[:end]
            rest = chunk[end:]
            if content:
                consumed, before = opened.tell(), consumed
                yield Partition(
                    file.name, consumed - before, file, content=pa.py_buffer(content), first=first, schema=schema
                )
                first += content.count(b"\n")
            if not chunk:
                return


def is_array(file: DataFile) -> bool:
    with file.stream() as stream:
        return bool(stream.read(_READ_AHEAD).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["))


def array_partitions(file: DataFile, size: int, schema: pa.Schema | None) -> Iterator[Partition]:
    """The records of a file that is one JSON array, which is held whole."""
    with file.stream() as stream:
        content = stream.read()
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise not_utf8(file.name) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file.name}:{error.lineno}: not a JSON array: {error.msg}; mend the file", field="data.path"
        ) from None
    lines: list[bytes] = []
    held, first = 0, 1
    for number, record in enumerate(records, 1):
        lines.append(json.dumps(record).encode() + b"\n")
        held += len(lines[-1])
        if held >= size or number == len(records):
            share = file.size * len(lines) // len(records)
            content = pa.py_buffer(b"".join(lines))
            yield Partition(file.name, share, file, content=content, first=first, unit="record", schema=schema)
            lines, held, first = [], 0, number + 1


def read_text(lines: pa.Buffer, partition: Partition) -> pa.Table:
    """A record a line."""
    text = without_marks(lines.to_pybytes())
    check_encoding(text, partition.where)
    try:
        whole = pa.array([text.decode()], pa.large_string())
    except UnicodeDecodeError:
        raise not_utf8(_place(partition, text)) from None
    split = pa.compute.list_flatten(pa.compute.split_pattern(whole, "\n"))
    if not text or text.endswith(b"\n"):
        split = split[:-1]
    return pa.table({"text": pa.compute.ascii_rtrim(split, "\r").cast(pa.large_string())})


def without_marks(lines: bytes) -> bytes:
    """The lines without the byte order marks that stay where files with one were joined."""
    return lines.replace(b"\n" + codecs.BOM_UTF8, b"\n").removeprefix(codecs.BOM_UTF8)


def _place(partition: Partition, text: bytes) -> str:
    """The first line of a partition that is not UTF-8."""
    number = first_line_not_utf8(pa.BufferReader(text)) or 1
    return f"{partition.where}:{_first_line_number(partition) + number - 1}"


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


def _first_line_number(partition: Partition) -> int:
    """The number of a partition's first line; counts the lines before it, so only errors ask for it."""
    if partition.content is not None or partition.start == 0:
        return partition.first
    assert partition.file is not None
    number, left = 1, partition.start
    with partition.file.open() as opened:
        last = b""
        while left:
            chunk = opened.read(min(left, 1 << 24))
            number += chunk.count(b"\n")
            left -= len(chunk)
            last = chunk[-1:]
    # The line that goes on into this partition is not its own.
    return number if last == b"\n" else number + 1

"""The files that `data.path` names, local or remote, cut into partitions.

A partition is what one task holds in memory. Lines of a file that is not compressed and the row groups of a Parquet
file are read by the tasks themselves; everything else can only be read from its beginning, so the process that hands
out the tasks reads it once and gives each task its content. How files are cut depends on their bytes alone, not on
how many tasks there are.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from glob import iglob
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from clm_dist.config.data import DataConfig
from clm_dist.errors import ClmDistError, ConfigError, DataError, ReadError, first_line
from clm_dist.prepare.fields import check_fields, select_fields
from clm_dist.prepare.records import Lines, broken_record, first_line_not_utf8, not_utf8, text_schema

Kind = Literal["json", "csv", "parquet", "arrow", "text"]

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_FORMATS: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_SHOWN_CHARACTERS = 200
# pyarrow parses a piece as one block, and its blocks end below 2 GiB.
_MAX_JSON_BLOCK = 2**31 - 1
_READ_AHEAD = 1 << 16
PROBE_BYTES = 1 << 20
"""Size of partitions that are read to see what a source is like."""
# pyarrow refuses a record of a CSV file that is larger.
_CSV_BLOCK = 1 << 26


@dataclass(frozen=True)
class DataFile:
    """One file, by its path or URL."""

    name: str
    size: int
    """Bytes as it lies there, compressed or not."""

    @property
    def suffixes(self) -> list[str]:
        return [suffix.lower() for suffix in Path(self.name.partition("?")[0]).suffixes]

    @property
    def compression(self) -> str | None:
        return _COMPRESSIONS.get(self.suffixes[-1]) if self.suffixes else None

    @property
    def kind(self) -> Kind | None:
        suffixes = [suffix for suffix in self.suffixes if suffix not in _COMPRESSIONS]
        return _FORMATS.get(suffixes[-1]) if suffixes else None

    @property
    def is_web(self) -> bool:
        return self.name.startswith(("http://", "https://"))

    def open(self) -> pa.NativeFile:
        """The file, which can seek; but web servers give most files from the beginning only."""
        if not is_url(self.name):
            return pa.OSFile(self.name)
        options = {"block_size": 0} if self.is_web and self.kind != "parquet" else {}
        return pa.PythonFile(fsspec.open(self.name, **options).open(), "r")

    def stream(self) -> pa.NativeFile:
        """What the file holds, from its beginning, decompressed."""
        opened = self.open()
        return pa.CompressedInputStream(opened, self.compression) if self.compression else opened


@dataclass(frozen=True)
class Partition:
    """Consecutive records of a source; `read_partition` reads them, in this process or in another."""

    where: str
    """The file or data set, for messages."""
    num_bytes: int
    """How much of the source it stands for, for progress."""
    file: DataFile | None = None
    start: int = 0
    """Bytes of lines that the task reads, of which those count that begin here; or row groups of a Parquet file."""
    stop: int = 0
    content: pa.Table | pa.Buffer | None = None
    """Records, or whole lines, that are read already."""
    first: int = 1
    """Number of the first line of the content, or of the first record where they are no lines."""
    unit: Literal["line", "record"] = "line"
    schema: pa.Schema | None = None
    """Types of the fields that the job reads in records of JSON."""


def is_url(path: str) -> bool:
    return "://" in path


def find_files(data: DataConfig) -> list[DataFile]:
    """The files that `data.path` names, sorted by name within each of its entries."""
    paths = [data.path] if isinstance(data.path, str) else data.path or []
    files: list[DataFile] = []
    for path in paths:
        if is_url(path):
            files += _expand_url(path)
            continue
        try:
            files += _expand(path)
        except (OSError, RuntimeError) as error:
            # A name that is too long, a directory that may not be read, the home of a user that is not there.
            problem = error.strerror if isinstance(error, OSError) else first_line(error)
            raise ConfigError(
                f"data.path {path[:_SHOWN_CHARACTERS]}: {problem}; give a file, a glob or a directory",
                field="data.path",
            ) from None
    for file in files:
        if file.kind is None:
            raise DataError(f"{file.name}: unknown kind of file; known are {', '.join(_FORMATS)}", field="data.path")
    return files


def _expand(path: str) -> list[DataFile]:
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        found = [_local_file(file) for file in sorted(expanded.rglob("*")) if file.is_file()]
        found = _known(found, path)
    elif expanded.is_file():
        found = [_local_file(expanded)]
    else:
        # Path.glob takes no absolute pattern.
        matches = map(Path, iglob(str(expanded), recursive=True))  # noqa: PTH207
        found = [_local_file(match) for match in sorted(matches) if match.is_file()]
        if not found:
            raise DataError(
                f"data.path {path} matches no file (looked from {Path.cwd()}); give a file, a glob or a directory",
                field="data.path",
            )
    return found


def _local_file(path: Path) -> DataFile:
    return DataFile(str(path.absolute()), path.stat().st_size)


def _expand_url(url: str) -> list[DataFile]:
    try:
        return _files_of_url(url)
    except ClmDistError:
        raise
    except Exception as error:  # each kind of storage raises errors of its own
        advice = "check the address, your network and your credentials"
        if isinstance(error, ImportError):
            extra = {"s3": "s3", "gs": "gs", "gcs": "gs"}.get(url.partition("://")[0])
            advice = f"pip install 'clm-dist[{extra}]'" if extra else "install the package that it names"
        raise ConfigError(
            f"data.path {url[:_SHOWN_CHARACTERS]}: {first_line(error)}; {advice}", field="data.path"
        ) from error


def _files_of_url(url: str) -> list[DataFile]:
    filesystem, path = fsspec.url_to_fs(url)
    # What it listed before may have changed since.
    filesystem.invalidate_cache()

    def described(names: list[str]) -> list[DataFile]:
        return [DataFile(filesystem.unstrip_protocol(name), filesystem.info(name)["size"] or 0) for name in names]

    if any(character in path for character in "*?[") and not url.startswith("http"):
        found = described(sorted(name for name in filesystem.glob(path) if filesystem.isfile(name)))
    elif url.startswith("http") or filesystem.isfile(path):
        found = [DataFile(url, filesystem.info(path)["size"] or 0)]
    elif filesystem.isdir(path):
        return _known(described(sorted(filesystem.find(path))), url)
    else:
        found = []
    if not found:
        raise DataError(f"data.path {url} matches no file; check the bucket and the name", field="data.path")
    return found


def _known(files: list[DataFile], path: str) -> list[DataFile]:
    known = [file for file in files if file.kind]
    if not known:
        raise DataError(
            f"data.path {path} is a directory with no file of a known kind ({', '.join(_FORMATS)}, "
            f"and these with {', '.join(_COMPRESSIONS)})",
            field="data.path",
        )
    return known


def partitions_of(file: DataFile, data: DataConfig, size: int, schema: pa.Schema | None) -> Iterator[Partition]:
    """A file's partitions of about `size` bytes, in order.

    Args:
        schema: types of the fields that the job reads, for JSON.

    Raises:
        DataError: the file is broken or lacks a field; the message names it and, where it can, the line.
    """
    with reading(file):
        match file.kind:
            case "json" | "text":
                if file.kind == "json" and ".json" in file.suffixes and _is_array(file):
                    yield from _array_partitions(file, size, schema)
                elif file.compression or file.is_web:
                    yield from _line_partitions(file, size, schema)
                else:
                    for start in range(0, file.size, size):
                        stop = min(start + size, file.size)
                        yield Partition(file.name, stop - start, file, start, stop, schema=schema)
            case "parquet":
                yield from _parquet_partitions(file, data, size)
            case "csv":
                yield from table_partitions(_csv_batches(file, data), file.name, size)
            case "arrow":
                yield from table_partitions(_arrow_batches(file, data), file.name, size)


def read_partition(partition: Partition, data: DataConfig) -> pa.Table:
    """A partition's records, with the columns that the job reads.

    Raises:
        DataError: a record is broken, not UTF-8, or of another type than the records before; the message names it.
    """
    if isinstance(partition.content, pa.Table):
        return _checked(partition.content)
    file = partition.file
    assert file is not None
    with reading(file):
        if file.kind == "parquet":
            with pa.parquet.ParquetFile(file.open()) as opened:
                columns = check_fields(opened.schema_arrow, data, file.name)
                groups = list(range(partition.start, partition.stop))
                return _checked(select_fields(opened.read_row_groups(groups, columns), data, file.name))
        lines = partition.content if partition.content is not None else _lines_between(file, partition)
        if partition.start == 0 and partition.first == 1 and lines[:3].to_pybytes() == b"\xef\xbb\xbf":
            lines = lines[3:]
        if file.kind == "text":
            return select_fields(_read_text(lines, partition), data, file.name)
        if partition.start == 0 and partition.first == 1:
            # Parsing takes a field that is not there for null, record by record.
            text_schema(_numbered(lines, partition), data)
        return select_fields(_read_json(lines, partition), data, file.name)


class reading:  # noqa: N801  # a context manager reads as a verb
    """Turns what goes wrong while a file is read into an error that names the file."""

    def __init__(self, file: DataFile) -> None:
        self.file = file

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UnicodeDecodeError) or (isinstance(error, pa.ArrowException) and "UTF8" in str(error)):
            number = None
            if self.file.kind in ("csv", "text"):
                with self.file.stream() as stream:
                    number = first_line_not_utf8(stream)
            raise not_utf8(f"{self.file.name}:{number}" if number else self.file.name) from None
        of_storage = is_url(self.file.name) and isinstance(error, Exception) and not isinstance(error, ClmDistError)
        if of_storage or isinstance(error, (pa.ArrowException, OSError, EOFError)):
            assert error is not None
            passing = of_storage or isinstance(error, (OSError, EOFError))
            raise (ReadError if passing else DataError)(
                f"{self.file.name}: cannot be read: {first_line(error)}; mend the file or take it out of data.path"
                f"{', or run the same command again' if passing else ''}",
                field="data.path",
            ) from None


def _lines_between(file: DataFile, partition: Partition) -> pa.Buffer:
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


def _line_partitions(file: DataFile, size: int, schema: pa.Schema | None) -> Iterator[Partition]:
    """Whole lines of a file that can only be read from its beginning."""
    first, consumed = 1, 0
    with file.open() as opened:
        stream = pa.CompressedInputStream(opened, file.compression) if file.compression else opened
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


def _is_array(file: DataFile) -> bool:
    with file.stream() as stream:
        return bool(stream.read(_READ_AHEAD).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["))


def _array_partitions(file: DataFile, size: int, schema: pa.Schema | None) -> Iterator[Partition]:
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


def _read_text(lines: pa.Buffer, partition: Partition) -> pa.Table:
    """A record a line."""
    text = lines.to_pybytes()
    try:
        whole = pa.array([text.decode()], pa.large_string())
    except UnicodeDecodeError:
        raise not_utf8(_place(partition, text)) from None
    split = pa.compute.list_flatten(pa.compute.split_pattern(whole, "\n"))
    if not text or text.endswith(b"\n"):
        split = split[:-1]
    return pa.table({"text": pa.compute.ascii_rtrim(split, "\r").cast(pa.large_string())})


def _place(partition: Partition, text: bytes) -> str:
    """The first line of a partition that is not UTF-8."""
    number = first_line_not_utf8(pa.BufferReader(text)) or 1
    return f"{partition.where}:{_first_line_number(partition) + number - 1}"


def _read_json(lines: pa.Buffer, partition: Partition) -> pa.Table:
    assert partition.schema is not None
    empty = partition.schema.empty_table()
    if lines.size > _MAX_JSON_BLOCK:
        raise DataError(f"{partition.where}: a record of {lines.size:,} bytes is too large; cut it", field="data.path")
    try:
        return _checked(
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
        raise broken_record(_numbered(lines, partition), partition.schema) or error from None


def _numbered(lines: pa.Buffer, partition: Partition) -> Lines:
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


def _parquet_partitions(file: DataFile, data: DataConfig, size: int) -> Iterator[Partition]:
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


def _csv_batches(file: DataFile, data: DataConfig) -> Iterator[pa.Table]:
    parse = pa.csv.ParseOptions(delimiter="\t" if ".tsv" in file.suffixes else ",", newlines_in_values=True)
    read = pa.csv.ReadOptions(block_size=_CSV_BLOCK)
    try:
        with file.stream() as stream, pa.csv.open_csv(stream, read, parse) as opened:
            names = opened.schema.names
    except pa.ArrowInvalid as error:
        if first_line(error) == "Empty CSV file":
            return
        raise
    # A CSV file knows no types: what is text is what the job reads as text, and the rest is not read at all.
    types = pa.schema([(name, pa.float64() if name == data.score else pa.large_string()) for name in names])
    columns = check_fields(types, data, file.name)
    convert = pa.csv.ConvertOptions(
        include_columns=columns,
        column_types={column: types.field(column).type for column in columns},
        strings_can_be_null=False,
    )
    with file.stream() as stream, pa.csv.open_csv(stream, read, parse, convert) as opened:
        for batch in opened:
            yield select_fields(pa.Table.from_batches([batch]), data, file.name)


def _arrow_batches(file: DataFile, data: DataConfig) -> Iterator[pa.Table]:
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


def _checked(table: pa.Table) -> pa.Table:
    """The table, whose strings and names are UTF-8: not every reader looks."""
    table.validate(full=True)
    _ = table.column_names
    return table


def infer_schema(file: DataFile, data: DataConfig) -> pa.Schema | None:
    """Types of the fields that the job reads in a file of JSON; None where the file has no records to tell.

    Raises:
        DataError: no record has such a field; or a record is broken.
    """
    for partition in partitions_of(file, data, PROBE_BYTES, pa.schema([])):
        with reading(file):
            lines = partition.content if partition.content is not None else _lines_between(file, partition)
        schema = text_schema(_numbered(lines, partition), data)
        if schema is not None:
            return schema
    return None

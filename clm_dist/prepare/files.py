"""The files that `data.path` names, each read as an Arrow table."""

import json
from collections.abc import Iterable, Iterator, Sequence
from glob import iglob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from clm_dist.config import DataConfig
from clm_dist.errors import ConfigError, DataError, first_line

_COMPRESSIONS = (".gz", ".zst", ".bz2")
_FORMATS = {
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
# A record must fit into one of pyarrow's JSON blocks.
_JSON_BLOCK_BYTES = 1 << 26
_SHOWN_CHARACTERS = 200


def find_files(data: DataConfig) -> list[Path]:
    """The files that `data.path` names, sorted by name within each of its entries."""
    paths = [data.path] if isinstance(data.path, str) else data.path or []
    files: list[Path] = []
    for path in paths:
        if "://" in path:
            raise ConfigError(f"data.path {path}: URLs are not supported yet; copy the files here", field="data.path")
        try:
            files += _expand(path)
        except (OSError, RuntimeError) as error:
            # A name that is too long, a directory that may not be read, the home of a user that is not there.
            problem = error.strerror if isinstance(error, OSError) else first_line(error)
            raise ConfigError(
                f"data.path {path[:_SHOWN_CHARACTERS]}: {problem}; give a file, a glob or a directory",
                field="data.path",
            ) from None
    return files


def _expand(path: str) -> list[Path]:
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        found = sorted(file for file in expanded.rglob("*") if file.is_file() and _format(file))
        if not found:
            raise DataError(
                f"data.path {path} is a directory with no file of a known kind ({', '.join(_FORMATS)}, "
                f"and these with {', '.join(_COMPRESSIONS)})",
                field="data.path",
            )
    elif expanded.is_file():
        found = [expanded]
    else:
        # Path.glob takes no absolute pattern.
        matches = map(Path, iglob(str(expanded), recursive=True))  # noqa: PTH207
        found = sorted(match for match in matches if match.is_file())
        if not found:
            raise DataError(
                f"data.path {path} matches no file (looked from {Path.cwd()}); give a file, a glob or a directory",
                field="data.path",
            )
    return [file.absolute() for file in found]


def _format(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSIONS]
    return _FORMATS.get(suffixes[-1].lower()) if suffixes else None


def read_file(file: Path, texts: Sequence[str]) -> pa.Table:
    """A file's records; in a CSV file the columns `texts` are text, whatever they look like.

    Raises:
        DataError: the file is of an unknown kind, broken or not UTF-8; the message names the line where it can.
    """
    kind = _format(file)
    if kind is None:
        raise DataError(f"{file}: unknown kind of file; known are {', '.join(_FORMATS)}", field="data.path")
    try:
        return _checked(_read(file, kind, texts))
    except (UnicodeDecodeError, pa.ArrowException, OSError, EOFError) as error:
        if first_line(error) in ("Empty CSV file", "Empty JSON file"):
            return pa.table({})
        if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
            line = _first_line_not_utf8(file) if kind in ("csv", "text") else None
            raise _not_utf8(f"{file}:{line}" if line else str(file)) from None
        raise DataError(
            f"{file}: cannot be read: {first_line(error)}; mend the file or take it out of data.path", field="data.path"
        ) from None


def _read(file: Path, kind: str, texts: Sequence[str]) -> pa.Table:
    if kind == "parquet":
        # Unlike read_table it takes a file whose columns share names.
        with pa.parquet.ParquetFile(file) as opened:
            return opened.read()
    if kind == "arrow":
        return _read_arrow(file)
    if kind == "json":
        return _read_json(file)
    with pa.input_stream(str(file), compression="detect") as stream:
        if kind == "text":
            lines = stream.read().decode("utf-8").splitlines()
            return pa.table({"text": pa.array(lines, pa.string())})
        delimiter = "\t" if ".tsv" in file.suffixes else ","
        return pa.csv.read_csv(
            stream,
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
        )


def _read_arrow(file: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def _read_json(file: Path) -> pa.Table:
    """The records of JSON lines, or of a file that is one JSON array."""
    try:
        with pa.input_stream(str(file), compression="detect") as stream:
            return _parse_json(stream)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        records = _array_items(file)
        if records is None:
            raise _broken_record(_lines(file), f"{file}:", "line") or error from None
    try:
        return _parse_json(pa.BufferReader(b"\n".join(records)))
    except pa.ArrowInvalid as error:
        raise _broken_record(enumerate(records, 1), f"{file}: record ", "record") or error from None


def _parse_json(stream: pa.NativeFile) -> pa.Table:
    return _checked(pa.json.read_json(stream, read_options=pa.json.ReadOptions(block_size=_JSON_BLOCK_BYTES)))


def _checked(table: pa.Table) -> pa.Table:
    """The table, whose strings and names are UTF-8: not every reader looks."""
    table.validate(full=True)
    _ = table.column_names
    return table


def _array_items(file: Path) -> list[bytes] | None:
    """The records of a file that is one JSON array, each as JSON; None for anything else."""
    with pa.input_stream(str(file), compression="detect") as stream:
        content = stream.read(1 << 16)
        if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return None
        content += stream.read()
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _not_utf8(str(file)) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}:{error.lineno}: not a JSON array: {error.msg}; mend the file", field="data.path"
        ) from None
    return [json.dumps(record).encode() for record in records]


def _broken_record(records: Iterable[tuple[int, bytes]], where: str, unit: str) -> DataError | None:
    """What is wrong with the first of numbered records that is none, or does not go with the ones before it."""

    def not_json(number: int, problem: object) -> DataError:
        return DataError(f"{where}{number}: not a JSON record: {problem}; mend or remove the {unit}", field="data.path")

    kinds: dict[str, tuple[str, int]] = {}
    for number, text in records:
        if not text.strip():
            continue
        try:
            record = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_without_duplicates)
            # Half of a surrogate pair is no character, which shows only here.
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeDecodeError:
            return _not_utf8(f"{where}{number}")
        except ValueError as error:
            return not_json(number, error)
        if not isinstance(record, dict):
            return not_json(number, f"{type(record).__name__} where an object is needed")
        for path, kind in _kinds(record):
            before, first = kinds.setdefault(path, (kind, number))
            if kind != before:
                return DataError(
                    f"{where}{number}: {path} is {kind}, but {before} in {unit} {first}; give it one type throughout",
                    field="data.path",
                )
    return None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)} is there twice")
    return record


def _kinds(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The JSON type at each dotted path of a record; nulls are of every type."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _kinds(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from _kinds(item, f"{path}[]")
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    if path and value is not None:
        yield path, names[type(value)]


def _not_utf8(where: str) -> DataError:
    return DataError(
        f"{where}: not UTF-8; save the file as UTF-8, for example with `iconv -f latin1 -t utf-8`", field="data.path"
    )


def _first_line_not_utf8(file: Path) -> int | None:
    for number, line in _lines(file):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    return None


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, numbered from 1."""
    with pa.input_stream(str(file), compression="detect") as stream:
        rest = b""
        number = 0
        while chunk := stream.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                number += 1
                yield number, line
        if rest:
            yield number + 1, rest

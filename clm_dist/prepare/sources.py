"""Records of a job's data as an Arrow table with just the columns that the job reads."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from glob import iglob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from clm_dist.config import DataConfig
from clm_dist.errors import ConfigError, DataError
from clm_dist.run_dir import read_json, write_json

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


def source_identity(data: DataConfig, digests: Path) -> dict[str, Any]:
    """What stands for the records in a store's fingerprint.

    A file is what it holds: one that was copied, moved or touched stays the same. The file `digests` remembers what
    files held, so that one whose size and time are as they were is not read again.
    """
    if data.source == "hub":
        return {"dataset": data.dataset, "config": data.config, "revision": data.revision, "split": data.split}
    if data.source == "builtin":
        return {"builtin": "pydoc_data.topics", "topics": _builtin_version(), "split": data.split}
    return {"files": _digests_of(find_files(data), digests), "split": data.split}


def _digests_of(files: list[Path], remembered: Path) -> list[tuple[str, str]]:
    """Suffix and sha256 of each file; the suffix says how it is read."""
    known = read_json(remembered) if remembered.exists() else {}
    keys = {file: f"{file.absolute()}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files}
    fresh = {}
    for file, key in keys.items():
        if key not in known:
            with file.open("rb") as opened:
                fresh[key] = hashlib.file_digest(opened, "sha256").hexdigest()
    if fresh:
        write_json(remembered, known | fresh)
    return [("".join(file.suffixes), (known | fresh)[key]) for file, key in keys.items()]


def load_records(data: DataConfig) -> pa.Table:
    """The records of the job's split or slice, with the columns that `data.text` and `data.id` begin with.

    Raises:
        ConfigError: the data set is not reachable, or has no such split.
        DataError: a path matches nothing, a file is broken, or a field is not there.
    """
    if data.source == "hub":
        return _columns(_load_hub(data), data, f"data set {data.dataset}")
    if data.source == "builtin":
        table = _columns(_load_builtin(), data, "the built-in corpus")
    else:
        tables = [_columns(_read_file(file), data, str(file)) for file in find_files(data)]
        table = pa.concat_tables(tables, promote_options="permissive")
    return _slice(table, data.split)


def find_files(data: DataConfig) -> list[Path]:
    """The files that `data.path` names, sorted by name within each of its entries."""
    paths = [data.path] if isinstance(data.path, str) else data.path or []
    files: list[Path] = []
    for path in paths:
        if "://" in path:
            raise ConfigError(f"data.path {path}: URLs are not supported yet; copy the files here", field="data.path")
        files += _expand(path)
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


def _read_file(file: Path) -> pa.Table:
    kind = _format(file)
    if kind is None:
        raise DataError(f"{file}: unknown kind of file; known are {', '.join(_FORMATS)}", field="data.path")
    try:
        if kind == "parquet":
            return pa.parquet.read_table(file)
        if kind == "arrow":
            return _read_arrow(file)
        with pa.input_stream(str(file), compression="detect") as stream:
            if kind == "csv":
                delimiter = "\t" if ".tsv" in file.suffixes else ","
                options = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
                return pa.csv.read_csv(stream, parse_options=options)
            if kind == "text":
                lines = stream.read().decode("utf-8").splitlines()
                return pa.table({"text": pa.array(lines, pa.string())})
            return _read_json(file, stream)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8: {error.reason} at byte {error.start}", field="data.path") from None
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read: {error}", field="data.path") from None


def _read_arrow(file: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def _read_json(file: Path, stream: pa.NativeFile) -> pa.Table:
    try:
        return pa.json.read_json(stream, read_options=pa.json.ReadOptions(block_size=_JSON_BLOCK_BYTES))
    except pa.ArrowInvalid as error:
        if records := _read_json_array(file):
            return pa.Table.from_pylist(records)
        broken = _first_broken_line(file)
        if broken:
            number, problem = broken
            raise DataError(
                f"{file}:{number}: not a JSON record: {problem}; mend or remove the line", field="data.path"
            ) from None
        raise DataError(f"{file}: {error}", field="data.path") from None


def _read_json_array(file: Path) -> list[Any] | None:
    """The records of a file that is one JSON array; None for anything else."""
    with pa.input_stream(str(file), compression="detect") as stream:
        if stream.read(1) != b"[":
            return None
    with pa.input_stream(str(file), compression="detect") as stream:
        try:
            records = json.loads(stream.read())
        except ValueError:
            return None
    return records if all(isinstance(record, dict) for record in records) else None


def _first_broken_line(file: Path) -> tuple[int, str] | None:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            return number, str(error)
        if not isinstance(record, dict):
            return number, f"{type(record).__name__} where an object is needed"
    return None


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
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


def _load_hub(data: DataConfig) -> pa.Table:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        dataset = load_dataset(data.dataset, data.config, split=data.split, revision=data.revision)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, OSError) as error:
        raise ConfigError(
            f"data.dataset {data.dataset} is not reachable on the Hub: {_first_sentence(error)}; check the id, your "
            "network and `hf auth login`, or use local files with --set data.source=files --set data.path=...",
            field="data.dataset",
        ) from None
    except (ValueError, RuntimeError) as error:
        # An unknown split or configuration, or a data set that is a script.
        raise ConfigError(f"data.dataset {data.dataset}: {_first_sentence(error)}", field="data.dataset") from None
    return dataset.with_format("arrow")[:]


def _load_builtin() -> pa.Table:
    from pydoc_data.topics import topics

    return pa.table({"topic": pa.array(topics.keys(), pa.string()), "text": pa.array(topics.values(), pa.string())})


def _builtin_version() -> list[int]:
    from pydoc_data.topics import topics

    return [len(topics), sum(map(len, topics.values()))]


def _slice(table: pa.Table, split: str) -> pa.Table:
    """The rows of `train[10%:20%]`. Files and the built-in corpus have one split, `train`."""
    from datasets.arrow_reader import ReadInstruction

    try:
        (rows,) = ReadInstruction.from_spec(split).to_absolute({"train": len(table)})
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"data.split {split}: {_first_sentence(error)}; files have one split, train: train, train[:5000] or "
            "train[10%:20%]",
            field="data.split",
        ) from None
    start, stop = rows.from_ or 0, len(table) if rows.to is None else rows.to
    return table.slice(start, stop - start)


def _columns(table: pa.Table, data: DataConfig, where: str) -> pa.Table:
    """The columns that the job reads. Raises DataError that names the fields that are there."""
    wanted: dict[str, None] = {}
    for option, path in (("data.text", data.text), ("data.id", data.id)):
        if path is None:
            continue
        fields = list(_field_paths(table.schema))
        if path not in fields:
            texts = ", ".join(fields)
            raise DataError(f"{option} {path} is not in {where}; its fields are: {texts}", field=option)
        wanted[column_of(path, table.column_names)] = None
    return table.select(list(wanted))


def column_of(path: str, columns: Sequence[str]) -> str:
    """The column that a dotted path begins in; a column may itself have dots in its name."""
    return path if path in columns else path.split(".")[0]


def _field_paths(fields: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of the fields of a schema or struct that are no structs themselves."""
    for field in fields:
        kind = field.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            yield from _field_paths([kind.field(i) for i in range(kind.num_fields)], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _first_sentence(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).rstrip(".")

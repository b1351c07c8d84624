"""Records of a job's data as an Arrow table with just the columns that the job reads."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from clm_dist.config import DataConfig
from clm_dist.errors import ConfigError, DataError, first_line
from clm_dist.prepare.files import find_files, read_file
from clm_dist.run_dir import read_json, write_json

_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def pinned(data: DataConfig) -> DataConfig:
    """The data with the commit that its Hub data set has now; where the Hub is out of reach, had when it was read last.

    A data set that has no such commit stays as it is, and loading it says what is wrong.
    """
    if data.source != "hub" or _is_directory(data):
        return data
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionResolutionError

    assert data.dataset
    try:
        resolved = HfApi().resolve_revision(data.dataset, repo_type="dataset", revision=data.revision)
    except (HfHubHTTPError, HFValidationError, RevisionResolutionError, OSError):
        return data
    return data.model_copy(update={"revision": resolved.resolved})


def source_identity(data: DataConfig, digests: Path) -> dict[str, Any]:
    """What stands for the records of data that is `pinned` in a store's fingerprint.

    A file is what it holds: one that was copied, moved or touched stays the same. The file `digests` remembers what
    files held, so that one whose size and time are as they were is not read again.
    """
    if data.source == "builtin":
        return {"builtin": "pydoc_data.topics", "topics": _builtin_version(), "split": data.split}
    if data.source == "files":
        files = find_files(data)
        # The suffix says how a file is read.
        suffixes = ["".join(file.suffixes) for file in files]
        return {"files": list(zip(suffixes, _digests_of(files, digests), strict=True)), "split": data.split}
    identity: dict[str, Any] = {"config": data.config, "split": data.split}
    if _is_directory(data):
        directory = Path(str(data.dataset))
        # `datasets` leaves out what is hidden, and sees from a file's name to which split it belongs.
        names = [file.relative_to(directory) for file in sorted(directory.rglob("*")) if file.is_file()]
        names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        files = [directory / name for name in names]
        return identity | {
            "directory": list(zip(map(str, names), _digests_of(files, digests, "data.dataset"), strict=True))
        }
    return identity | {"dataset": data.dataset, "revision": data.revision}


def _is_directory(data: DataConfig) -> bool:
    # Path.is_dir raises for a name that is too long.
    return os.path.isdir(data.dataset or "")  # noqa: PTH112


def _digests_of(files: list[Path], remembered: Path, field: str = "data.path") -> list[str]:
    """The sha256 of each file."""
    try:
        known = dict(read_json(remembered))
    except (ConfigError, OSError, ValueError, TypeError):
        # Only a memory: without it the files are read again.
        known = {}
    digests, fresh = [], {}
    for file in files:
        try:
            stat = file.stat()
            key = f"{file.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"
            if key not in known:
                with file.open("rb") as opened:
                    fresh[key] = known[key] = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read: {error.strerror}; give it to the user who runs this, or take it out of "
                f"{field}",
                field=field,
            ) from None
        digests.append(known[key])
    if fresh:
        write_json(remembered, known)
    return digests


def load_records(data: DataConfig) -> pa.Table:
    """The records of the job's split or slice, with the columns that `data.text` and `data.id` begin with.

    Raises:
        ConfigError: the data set is not reachable, or has no such split.
        DataError: a path matches nothing, a file is broken, a field is not there, or there are no records.
    """
    if data.source == "hub":
        where = f"the data set {data.dataset}"
        table = _columns(_load_hub(data), data, where)
    elif data.source == "builtin":
        where = "the built-in corpus"
        table = _slice(_columns(_load_builtin(), data, where), data.split)
    else:
        where = f"data.path {data.path}"
        table = _slice(_load_files(data, where), data.split)
    if len(table) == 0:
        raise DataError(f"data.split {data.split} has no records of {where}; take a larger part", field="data.split")
    return table


def _load_files(data: DataConfig, where: str) -> pa.Table:
    texts = [path for path in (data.text, data.id) if path]
    tables: list[pa.Table] = []
    schema = pa.schema([])
    for file in find_files(data):
        table = read_file(file, texts)
        if len(table) == 0:
            continue
        tables.append(_columns(table, data, str(file)))
        try:
            schema = pa.unify_schemas([schema, tables[-1].schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{file} does not go with the files before it: {first_line(error)}; give a field the same type in all "
                "files, or prepare them apart",
                field="data.path",
            ) from None
    if not tables:
        raise DataError(f"{where} has no records: its files are empty; name files with text", field="data.path")
    return pa.concat_tables(tables, promote_options="permissive")


def _load_hub(data: DataConfig) -> pa.Table:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    local = _is_directory(data)
    try:
        dataset = load_dataset(data.dataset, data.config, split=data.split, revision=data.revision)
    except (ValueError, RuntimeError, DatasetGenerationError) as error:
        # An unknown split or configuration, a data set that is a script, or a broken file.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise ConfigError(
            f"data.dataset {data.dataset}: {first_line(cause)}; check data.config, data.split and the data set's files",
            field="data.dataset",
        ) from None
    except OSError as error:
        if local:
            raise ConfigError(f"data.dataset {data.dataset}: {first_line(error)}", field="data.dataset") from None
        raise ConfigError(
            f"data.dataset {data.dataset} is not reachable on the Hub: {first_line(error)}; check the id, your "
            "network and `hf auth login`, or use local files with --set data.source=files --set data.path=...",
            field="data.dataset",
        ) from None
    # With no network the library takes whatever commit it read last.
    read = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    if not local and re.fullmatch("[0-9a-f]{40}", data.revision or "") and read - {data.revision}:
        raise ConfigError(
            f"data.dataset {data.dataset}: the Hub is not reachable, and `datasets` gives commit {', '.join(read)}, "
            f"not {data.revision} as the job needs; set data.revision to that one, or prepare where there is a network",
            field="data.dataset",
        )
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
            f"data.split {split}: {first_line(error)}; files have one split, train: train, train[:5000] or "
            "train[10%:20%]",
            field="data.split",
        ) from None
    start, stop = rows.from_ or 0, len(table) if rows.to is None else rows.to
    return table.slice(start, stop - start)


def _columns(table: pa.Table, data: DataConfig, where: str) -> pa.Table:
    """The columns that the job reads. Raises DataError that names the fields that are there."""
    fields = dict(_fields(table.schema))
    wanted: dict[str, None] = {}
    for option, path in (("data.text", data.text), ("data.id", data.id if data.split_method == "hash" else None)):
        if path is None:
            continue
        if path not in fields:
            advice = "; null hashes the text instead" if option == "data.id" else ""
            raise DataError(
                f"{option} {path} is not in {where}; its fields are: {', '.join(fields)}{advice}", field=option
            )
        column = column_of(path, table.column_names)
        if table.column_names.count(column) > 1:
            raise DataError(f"{where} has several columns {column}; give each a name of its own", field=option)
        wanted[column] = None
    if not _is_text(fields[data.text]):
        texts = ", ".join(path for path, kind in fields.items() if _is_text(kind)) or "none"
        raise DataError(
            f"data.text {data.text} is {fields[data.text]} in {where}, not text; its fields of text are: {texts}",
            field="data.text",
        )
    table = table.select(list(wanted))
    schema = pa.schema([field.with_type(_without_views(field.type)) for field in table.schema])
    return table if schema == table.schema else table.cast(schema)


def column_of(path: str, columns: Sequence[str]) -> str:
    """The column that a dotted path begins in; a column may itself have dots in its name."""
    return path if path in columns else path.split(".")[0]


def _fields(fields: Any, prefix: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Dotted path and type of the fields of a schema or struct that are no structs themselves; lists count as items."""
    for field in fields:
        kind = field.type
        while any(is_list(kind) for is_list in _LISTS):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            yield from _fields([kind.field(i) for i in range(kind.num_fields)], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind


def _is_text(kind: pa.DataType) -> bool:
    """Whether a field holds text, or nothing but nulls."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _without_views(kind: pa.DataType) -> pa.DataType:
    """A type with strings in place of string views, whose rows Arrow cannot take."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    if any(is_list(kind) for is_list in _LISTS):
        items = _without_views(kind.value_type)
        return kind if items == kind.value_type else pa.large_list(items)
    return pa.string() if kind == pa.string_view() else kind

"""JSON files that are one value: a list of records, or an object that keeps the list in a field (`data.field`)."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from clm_dist.config.data import DataConfig
from clm_dist.errors import DataError
from clm_dist.prepare.data_file import DataFile
from clm_dist.prepare.json_lines import not_utf8, without_duplicates
from clm_dist.prepare.partition import Partition

_SNIFFED_BYTES = 1 << 16
_SHOWN_FIELDS = 20
# More is not read just to say more about an error.
_ADVISED_BYTES = 1 << 26


def is_one_value(file: DataFile, data: DataConfig) -> bool:
    """Whether a file of JSON is one list or one object, not a record a line."""
    if file.kind != "json" or ".json" not in file.suffixes:
        return False
    if data.field is not None:
        return True
    with file.stream() as stream:
        return bool(stream.read(_SNIFFED_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["))


def list_partitions(file: DataFile, data: DataConfig, size: int, schema: pa.Schema | None) -> Iterator[Partition]:
    """The records of a file that is one value, which is held whole."""
    what = "array" if data.field is None else "object"
    try:
        value = json.loads(file.content().decode("utf-8-sig"), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError:
        raise not_utf8(file.name) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file.name}:{error.lineno}: not a JSON {what}: {error.msg}; mend the file", field="data.path"
        ) from None
    except ValueError as error:
        raise DataError(f"{file.name}: not a JSON {what}: {error}; mend the file", field="data.path") from None
    except RecursionError:
        raise DataError(f"{file.name}: it is nested too deeply; mend the file", field="data.path") from None
    records = value if data.field is None else _records_at(data.field, value, file.name)
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


def _records_at(field: str, value: Any, where: str) -> list[Any]:
    """The list at a dotted path of an object."""
    if not isinstance(value, dict):
        raise DataError(
            f"data.field is {field}, but {where} is {_kind(value)}, not an object; set data.field to null",
            field="data.field",
        )
    found = [inner for path, inner in _fields(value) if path == field]
    if not found:
        names = [path for path, inner in _fields(value) if not isinstance(inner, dict)]
        more = f" and {len(names) - _SHOWN_FIELDS} more" if len(names) > _SHOWN_FIELDS else ""
        raise DataError(
            f"data.field {field} is not in {where}; its fields are: {', '.join(names[:_SHOWN_FIELDS])}{more}",
            field="data.field",
        )
    if len(found) > 1:
        raise DataError(f"data.field {field} stands for two values in {where}; rename a key", field="data.field")
    if not isinstance(found[0], list):
        lists = ", ".join(path for path, inner in _fields(value) if isinstance(inner, list)) or "none"
        raise DataError(
            f"data.field {field} is {_kind(found[0])} in {where}, not a list of records; its lists are: {lists}",
            field="data.field",
        )
    return found[0]


def _fields(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of all that lies in an object, through objects on the way."""
    for key, inner in value.items():
        yield f"{prefix}{key}", inner
        if isinstance(inner, dict):
            yield from _fields(inner, f"{prefix}{key}.")


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "text", type(None): "null"}
    return kinds.get(type(value), "a number, true or false")


class advising:  # noqa: N801  # a context manager reads as a verb
    """Adds to what is wrong with the lines of a JSON file that it is one object with lists, where it is."""

    def __init__(self, file: DataFile, data: DataConfig) -> None:
        self.file = file
        self.data = data

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        is_lines = self.file.kind == "json" and self.data.field is None and ".json" in self.file.suffixes
        # How long a compressed file is inside is not known.
        is_small = self.file.compression is None and 0 < self.file.size <= _ADVISED_BYTES
        if not isinstance(error, DataError) or not is_lines or not is_small:
            return
        try:
            value = json.loads(self.file.content().decode("utf-8-sig"))
        except Exception:  # it is advice, and the error itself is said all the same
            return
        if not isinstance(value, dict):
            return
        found = ((path, inner) for path, inner in _fields(value) if isinstance(inner, list))
        lists = [path for path, inner in found if inner and isinstance(inner[0], dict)]
        if not lists:
            return
        advice = f"if its records are the list {' or '.join(lists[:3])}, set data.field to {lists[0]}"
        problem = f"{self.file.name} is one JSON object, not a record a line; {advice}"
        if error.field != "data.path":
            problem = f"{error}; the file is one JSON object: {advice}"
        raise DataError(problem, field=error.field) from None

"""Single records of JSON: the types of the fields that a job reads, and what is wrong with a record that is none."""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from clm_dist.config.data import DataConfig
from clm_dist.errors import DataError
from clm_dist.prepare.fields import check_fields, wanted_paths

_SAMPLE_RECORDS = 1000
_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Lines:
    """Records of JSON, one a line, and how a message names one of them."""

    content: bytes
    file: str
    unit: Literal["line", "record"]
    """The meaning of a line: a line of the file, or a record of its one array."""
    first: Callable[[], int]
    """The number of the first line; called where something is wrong, since it may have to count."""

    def place(self, index: int) -> str:
        number = self.first() + index
        return f"{self.file}: record {number}" if self.unit == "record" else f"{self.file}:{number}"


def text_schema(lines: Lines, data: DataConfig) -> pa.Schema | None:
    """Types of the fields that the job reads, from the first records that have them.

    Returns:
        The columns that the fields begin in, with nothing in them that the job does not read; None where there are no
        records, or every value is null or an empty list.

    Raises:
        DataError: no record has such a field, or it is not text; or a line before is broken.
    """
    sample: list[dict[str, Any]] = []
    missing = {path: None for _, path in wanted_paths(data)}
    known: dict[str, pa.DataType] = {}
    for line in lines.content.split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
            # Half of a surrogate pair is not a character.
            json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise broken_record(lines, pa.schema([])) or AssertionError(line)
        if len(sample) < _SAMPLE_RECORDS:
            sample.append(record)
        for path in list(missing):
            column = path if path in record else path.split(".")[0]
            inner = path[len(column) + 1 :].split(".") if path != column else []
            kind = _kind_at(record.get(column), inner)
            if kind is not None:
                known[column] = _merged(known[column], kind) if column in known else kind
                del missing[path]
        if not missing and len(sample) >= min(_SAMPLE_RECORDS, 10):
            break
    if not sample:
        return None
    _check_sample(sample, known, data, lines.file)
    if missing:
        return None
    if data.score:
        known = {column: _with_fractions(kind) for column, kind in known.items()}
    return pa.schema(known)


def _check_sample(sample: list[dict[str, Any]], known: dict[str, pa.DataType], data: DataConfig, where: str) -> None:
    """Raise DataError where a field is not in the records, with the fields that are."""
    try:
        schema = pa.schema(list(pa.array(sample).type))
    except (pa.ArrowException, OverflowError):
        # Fields that the job does not read have several types, or numbers that no type holds.
        names = {name: pa.null() for record in sample for name in record}
        schema = pa.schema(names | known)
    check_fields(schema, data, where)


def _kind_at(value: Any, path: Sequence[str]) -> pa.DataType | None:
    """The Arrow type of what lies at a path, with the lists and objects on the way; None where nothing tells it."""
    if isinstance(value, list):
        kinds = (_kind_at(item, path) for item in value)
        kind = next((kind for kind in kinds if kind is not None), None)
        return None if kind is None else pa.list_(kind)
    if isinstance(value, dict) and path:
        kind = _kind_at(value.get(path[0]), path[1:])
        return None if kind is None else pa.struct([(path[0], kind)])
    if isinstance(value, str):
        return None if path else pa.large_string()
    if isinstance(value, int) and not isinstance(value, bool) and not path:
        return pa.int64()
    return None if value is None or path else pa.array([value]).type


def _merged(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """A type with the fields of both."""
    if pa.types.is_list(one) and pa.types.is_list(other):
        return pa.list_(_merged(one.value_type, other.value_type))
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = {field.name: field.type for field in one}
        for field in other:
            fields[field.name] = _merged(fields[field.name], field.type) if field.name in fields else field.type
        return pa.struct(list(fields.items()))
    return one


def _with_fractions(kind: pa.DataType) -> pa.DataType:
    """A type whose whole numbers may have fractions: scores that begin with 1 may go on with 1.5."""
    if pa.types.is_list(kind):
        return pa.list_(_with_fractions(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_fractions(field.type)) for field in kind])
    return pa.float64() if pa.types.is_integer(kind) else kind


def broken_record(lines: Lines, schema: pa.Schema) -> DataError | None:
    """The error of the first line that is not a record, or whose types differ from those before it.

    Args:
        schema: types of the fields that the job reads, as the records before have them.
    """

    def not_json(index: int, problem: object) -> DataError:
        return DataError(
            f"{lines.place(index)}: not a JSON record: {problem}; mend or remove the {lines.unit}", field="data.path"
        )

    expected = dict(_kinds_of_schema(schema))
    seen: dict[str, int] = {}
    for index, text in enumerate(lines.content.split(b"\n")):
        if not text.strip():
            continue
        try:
            record = json.loads(text.decode("utf-8-sig"), object_pairs_hook=without_duplicates)
            # Half of a surrogate pair is not a character, which shows only here.
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeDecodeError:
            return not_utf8(lines.place(index))
        except ValueError as error:
            return not_json(index, error)
        except RecursionError:
            return not_json(index, "it is nested too deeply")
        if not isinstance(record, dict):
            return not_json(index, f"{type(record).__name__} where an object is needed")
        for path, kind in _kinds(record):
            before = expected.get(path, kind)
            if kind != before:
                place = f"in {lines.unit} {lines.first() + seen[path]}" if path in seen else "in the records before"
                return DataError(
                    f"{lines.place(index)}: {path} is {kind}, but {before} {place}; give it one type throughout",
                    field="data.path",
                )
            seen.setdefault(path, index)
    return None


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values. Raises ValueError where a key is there twice."""
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
    if path and value is not None:
        yield path, _KINDS[type(value)]


def _kinds_of_schema(fields: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The JSON type that an Arrow type stands for, at each dotted path."""
    for field in fields:
        path, kind = f"{prefix}{field.name}", field.type
        while pa.types.is_list(kind):
            yield path, _KINDS[list]
            path, kind = f"{path}[]", kind.value_type
        if pa.types.is_struct(kind):
            yield path, _KINDS[dict]
            yield from _kinds_of_schema(kind, f"{path}.")
        elif not pa.types.is_null(kind):
            number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            yield path, _KINDS[int if number else bool if pa.types.is_boolean(kind) else str]


def not_utf8(where: str, *, is_text: bool = True) -> DataError:
    """The error of a place that is not UTF-8.

    Args:
        is_text: whether `data.encoding` says what the file is; Parquet and Arrow have UTF-8 alone.
    """
    advice = "set data.encoding to its encoding, such as latin-1 or cp1252, or save" if is_text else "save"
    return DataError(f"{where}: not UTF-8; {advice} the file as UTF-8", field="data.path")


def check_encoding(content: bytes, where: str, encoding: str | None = None) -> None:
    """Raise DataError for text of an encoding that would be read as other text, or not as text at all.

    Args:
        encoding: that of the file, from which the content was decoded; None is UTF-8.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise DataError(
            f"{where}: UTF-32, not UTF-8; set data.encoding to utf-32, or save the file as UTF-8", field="data.path"
        )
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{where}: UTF-16, not UTF-8; set data.encoding to utf-16, or save the file as UTF-8", field="data.path"
        )
    if b"\0" in content and encoding:
        raise DataError(
            f"{where}: holds NUL bytes as {encoding}, so it is not text of this encoding; set data.encoding to that "
            "of the file, or take it out of data.path",
            field="data.encoding",
        )
    if b"\0" in content:
        # Of a character below 256 the low byte comes first, or last.
        order = "le" if content[1::2].count(0) >= content[::2].count(0) else "be"
        raise DataError(
            f"{where}: holds NUL bytes, so it is not text, or is UTF-16; set data.encoding to utf-16-{order}, or take "
            "the file out of data.path",
            field="data.path",
        )


def first_line_not_utf8(stream: pa.NativeFile) -> int | None:
    """The number of the first line, from 1, that is not UTF-8."""
    rest = b""
    number = 0
    while chunk := stream.read(1 << 20):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            if not _is_utf8(line):
                return number
    return number + 1 if not _is_utf8(rest) else None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True

"""The fields of records that a job reads: dotted paths, and the Arrow types behind them."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from clm_dist.config.data import DataConfig
from clm_dist.errors import DataError, first_line

_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def wanted_paths(data: DataConfig) -> list[tuple[str, str]]:
    """Every path that the job reads, with the option that names it."""
    paths = [("data.text", path) for path in data.text_template.paths]
    if data.score:
        paths.append(("data.score", data.score))
    if data.splits_by_hash and data.id:
        paths.append(("data.id", data.id))
    return paths


def column_of(path: str, columns: Sequence[str]) -> str:
    """The column that a dotted path begins in; a column may itself have dots in its name."""
    return path if path in columns else path.split(".")[0]


def is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _LISTS)


def check_fields(schema: pa.Schema, data: DataConfig, where: str) -> list[str]:
    """The columns that the job reads. Raises DataError that names the fields that are there."""
    fields = dict(_fields(schema))
    texts = ", ".join(path for path, kind in fields.items() if _is_text(kind)) or "none"
    columns: dict[str, None] = {}
    for option, path in wanted_paths(data):
        if path not in fields:
            advice = "; null hashes the text instead" if option == "data.id" else ""
            raise DataError(
                f"{option} {path} is not in {where}; its fields are: {', '.join(fields)}{advice}", field=option
            )
        column = column_of(path, schema.names)
        if schema.names.count(column) > 1:
            raise DataError(f"{where} has several columns {column}; give each a name of its own", field=option)
        if option == "data.text" and not _is_text(fields[path]):
            raise DataError(
                f"data.text {path} is {fields[path]} in {where}, not text; its fields of text are: {texts}",
                field=option,
            )
        if option == "data.score" and not _is_number(fields[path]):
            raise DataError(f"data.score {path} is {fields[path]} in {where}, not a number", field=option)
        columns[column] = None
    return list(columns)


def select_fields(table: pa.Table, data: DataConfig, where: str) -> pa.Table:
    """The columns that the job reads, with lists and texts in one type each. Raises DataError, see `check_fields`."""
    table = table.select(check_fields(table.schema, data, where))
    schema = pa.schema([field.with_type(_plain(field.type)) for field in table.schema])
    try:
        return table if schema == table.schema else table.cast(schema)
    except pa.ArrowInvalid as error:
        # Lists of a fixed size of which some are null.
        raise DataError(
            f"{where}: {first_line(error)}; write the column as a list of any size", field="data.text"
        ) from None


def _plain(kind: pa.DataType) -> pa.DataType:
    """A type in which texts are `large_string` (as the tokenizers take them) and lists are `list`."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if is_list(kind):
        return pa.list_(_plain(kind.value_type))
    return pa.large_string() if _is_text(kind) and not pa.types.is_null(kind) else kind


def _fields(fields: Any, prefix: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Dotted path and type of the fields of a schema or struct that are not structs; lists count as items."""
    for field in fields:
        kind = field.type
        while is_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            yield from _fields([kind.field(i) for i in range(kind.num_fields)], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind


def _is_text(kind: pa.DataType) -> bool:
    """Whether a field holds text, or nothing but nulls."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def _is_number(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
    return any(is_kind(kind) for is_kind in kinds)

"""Records to documents: which texts of a record are used, and how they become documents.

Everything is done on whole columns. A field such as `answers.text` is flattened into its values and, beside them, the
record that each value is of:

    answers.text  [["a", "b"], [], ["c"]]   ->   values a b c, records 0 0 2
    join " "                                ->   documents "a b", "c" of the records 0 and 2; record 1 is empty
    join null                               ->   documents "a", "b", "c"
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clm_dist.config.data import DataConfig
from clm_dist.config.job import JobConfig
from clm_dist.errors import DataError
from clm_dist.prepare.fields import column_of, is_list

_STRING = pa.large_string()
_KEY_BYTES = 8


class Skip(IntEnum):
    """Why a record has no document."""

    USED = 0
    EMPTY = 1
    LOW_SCORE = 2


@dataclass(frozen=True)
class Documents:
    """The documents of consecutive records."""

    texts: pa.Array
    """(num_documents,) large_string with no nulls; its buffers begin at the first text."""
    records: npt.NDArray[np.int64]
    """Which record each document is of, (num_documents,), ascending."""
    skipped: npt.NDArray[np.uint8]
    """A `Skip` for each record, (num_records,)."""


@dataclass(frozen=True)
class _Values:
    """The values of a field, with the record of each."""

    values: pa.Array
    records: npt.NDArray[np.int64]
    nested: bool
    """Whether a record may have several."""
    items: str = ""
    """Path of the list whose items have this field, or of the lists that it is one of; empty for a list of its own."""


def documents_of(table: pa.Table, data: DataConfig) -> Documents:
    """The documents of a table's records, in order.

    Raises:
        DataError: the scores or the fields of a template do not go with each other.
    """
    literals, paths = data.text_template
    fields = [values_of(table, path) for path in paths]
    low = np.zeros(len(table), bool)
    if data.min_score is not None:
        assert data.score is not None
        fields, low = _with_scores(fields, values_of(table, data.score), data, len(table))
    if data.join is not None and _are_of_one_list(fields, paths):
        literals, fields = ("", ""), [_by_item(literals, fields, paths)]
    fields = [_without_nulls(field) for field in fields]
    if data.join is None:
        fields = _as_documents(fields, paths)
    else:
        fields = [_joined(field, data.join, len(table)) for field in fields]
    records = fields[0].records
    texts = [field.values for field in fields]
    blank = np.logical_and.reduce([_is_blank(text) for text in texts])
    if data.min_score is not None:
        blank |= low[records]
    whole = texts[0] if literals == ("", "") else _filled(literals, texts)
    kept = ~blank
    if not kept.all():
        whole, records = whole.filter(pa.array(kept)), records[kept]
    skipped = np.full(len(table), Skip.EMPTY, np.uint8)
    skipped[low] = Skip.LOW_SCORE
    skipped[records] = Skip.USED
    return Documents(pa.concat_arrays([whole]), records, skipped)


def held_out(table: pa.Table, data: DataConfig) -> npt.NDArray[np.bool_]:
    """Which records `split_method: hash` puts into the eval split: by a record's key alone, at every size alike."""
    keys: list[list[str]] = [[] for _ in range(len(table))]
    for path in (data.id,) if data.id else data.text_template.paths:
        field = _without_nulls(values_of(table, path))
        for record, value in zip(field.records.tolist(), field.values.to_pylist(), strict=True):
            keys[record].append(str(value))
    bound = int(data.eval_fraction * 2 ** (8 * _KEY_BYTES))
    digests = (hashlib.blake2b(" ".join(key).encode(), digest_size=_KEY_BYTES).digest() for key in keys)
    return np.array([int.from_bytes(digest) < bound for digest in digests], bool)


def values_of(table: pa.Table, path: str) -> _Values:
    """The values at a dotted path, through structs and lists on the way."""
    column = column_of(path, table.column_names)
    inner = path[len(column) + 1 :].split(".") if path != column else []
    chunks = table.column(column).chunks
    values = pa.concat_arrays(chunks) if chunks else pa.array([], table.schema.field(column).type)
    records = np.arange(len(values))
    above, items, nested = [column], [column], False
    while True:
        if is_list(values.type):
            records = records[pc.list_parent_indices(values).to_numpy()]
            values, items, nested = pc.list_flatten(values), list(above), True
        elif inner and pa.types.is_struct(values.type):
            above.append(inner.pop(0))
            values = pc.struct_field(values, above[-1])
        else:
            break
    # A list of texts is one of the lists beside it.
    shared = ".".join(above[:-1] if items == above else items)
    return _Values(values.cast(_STRING) if pa.types.is_null(values.type) else values, records, nested, shared)


def _without_nulls(field: _Values) -> _Values:
    if field.values.null_count == 0:
        return field
    valid = field.values.is_valid()
    records = field.records[valid.to_numpy(zero_copy_only=False)]
    return replace(field, values=field.values.filter(valid), records=records)


def _with_scores(
    fields: Sequence[_Values], score: _Values, data: DataConfig, num_records: int
) -> tuple[list[_Values], npt.NDArray[np.bool_]]:
    """The fields without the texts whose score is too low, and which records have none left for that reason."""
    enough = pc.fill_null(pc.greater_equal(score.values.cast(pa.float64()), data.min_score), False)
    kept = enough.to_numpy(zero_copy_only=False)
    low = np.zeros(num_records, bool)
    found = False
    filtered = []
    for field in fields:
        if field.nested != score.nested:
            filtered.append(field)
            continue
        if not np.array_equal(field.records, score.records):
            raise DataError(
                f"data.score {data.score} has {len(score.values)} values for {len(field.values)} texts of data.text "
                f"{data.text}; every text needs a score of its own",
                field="data.score",
            )
        found = True
        filtered.append(replace(field, values=field.values.filter(enough), records=field.records[kept]))
        had, has = (np.bincount(records, minlength=num_records) > 0 for records in (field.records, field.records[kept]))
        low |= had & ~has
    if not found:
        raise DataError(
            f"data.score {data.score} is not beside a text of data.text {data.text}: one lies in a list, the other "
            "does not; name the field of the texts' own scores",
            field="data.score",
        )
    return filtered, low


def _are_of_one_list(fields: Sequence[_Values], paths: Sequence[str]) -> bool:
    """Whether a template is filled item by item, because some of its fields are of the items of one list.

    Raises:
        DataError: other fields of the template are not.
    """
    items = {path: field.items for path, field in zip(paths, fields, strict=True) if field.nested and field.items}
    shared = [path for path in items if list(items.values()).count(items[path]) > 1]
    if not shared:
        return False
    if others := [path for path in paths if items.get(path) != items[shared[0]]]:
        raise DataError(
            f"data.text: {shared[0]} and {shared[1]} are filled in item by item, and {others[0]} is not in their list; "
            "leave it out, or set data.join to null, which makes each item a document",
            field="data.text",
        )
    return True


def _by_item(literals: Sequence[str], fields: Sequence[_Values], paths: Sequence[str]) -> _Values:
    """The template with the fields of every item filled in; null for an item without text."""
    for field, path in zip(fields, paths, strict=True):
        if not np.array_equal(field.records, fields[0].records):
            raise DataError(
                f"data.text: {path} and {paths[0]} have other numbers of items; name fields of one list",
                field="data.text",
            )
    texts = [pc.fill_null(field.values, pa.scalar("", _STRING)) for field in fields]
    blank = np.logical_and.reduce([_is_blank(text) for text in texts])
    filled = pc.if_else(pa.array(blank), pa.scalar(None, _STRING), _filled(literals, texts))
    return _Values(filled, fields[0].records, nested=True)


def _joined(field: _Values, joint: str, num_records: int) -> _Values:
    """One text a record: its values with `joint` between them; empty where it has none."""
    counts = np.bincount(field.records, minlength=num_records)
    every = np.arange(num_records)
    if counts.size == len(field.values) and (counts == 1).all():
        return _Values(field.values, every, nested=False)
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(ends), field.values)
    return _Values(pc.binary_join(lists, pa.scalar(joint, _STRING)), every, nested=False)


def _as_documents(fields: Sequence[_Values], paths: Sequence[str]) -> list[_Values]:
    """Every value a document of its own; a field with one value a record goes with each of the record's documents."""
    leader = next((field for field in fields if field.nested), fields[0])
    aligned = []
    for field, path in zip(fields, paths, strict=True):
        if np.array_equal(field.records, leader.records):
            aligned.append(_Values(field.values, leader.records, leader.nested))
            continue
        if field.nested:
            raise DataError(
                f"data.text: {path} and {paths[fields.index(leader)]} have other numbers of items, and data.join null "
                "makes each item a document; join them, or name one list",
                field="data.text",
            )
        # Where a record has no value there is nothing to take: an empty text stands in.
        place = np.searchsorted(field.records, leader.records)
        present = np.isin(leader.records, field.records)
        taken = field.values.take(pa.array(np.where(present, place, 0), mask=~present))
        aligned.append(_Values(pc.fill_null(taken, pa.scalar("", _STRING)), leader.records, nested=True))
    return aligned


def _filled(literals: Sequence[str], texts: Sequence[pa.Array]) -> pa.Array:
    """A template with its fields filled in, for every document."""
    parts: list[Any] = [pa.scalar(literals[0], _STRING)]
    for text, literal in zip(texts, literals[1:], strict=True):
        parts += [text, pa.scalar(literal, _STRING)]
    return pc.binary_join_element_wise(*parts, pa.scalar("", _STRING))


def _is_blank(texts: pa.Array) -> npt.NDArray[np.bool_]:
    empty = pc.equal(pc.binary_length(texts), 0)
    blank: npt.NDArray[np.bool_] = pc.or_(empty, pc.utf8_is_space(texts)).to_numpy(zero_copy_only=False)
    return blank


def no_text(job: JobConfig, num_records: int, where: str) -> DataError:
    return DataError(
        f"data.text {job.data.text} is empty in all {num_records:,} records of {where}; name the field that holds "
        "the text",
        field="data.text",
    )

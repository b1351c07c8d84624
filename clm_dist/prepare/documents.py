"""Records to documents, and which records are held out for evaluation."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clm_dist.config import DataConfig
from clm_dist.errors import DataError
from clm_dist.prepare.sources import column_of

Rows = npt.NDArray[np.int64]
"""Numbers of rows, (num_records,)."""


def documents_of(table: pa.Table, data: DataConfig) -> list[list[str]]:
    """The documents of each record: none where its text is empty or null, one, or one an item of a list."""
    documents = []
    for texts in _texts(table, data.text):
        if data.join is not None:
            texts = [data.join.join(texts)]
        documents.append([text for text in texts if text.strip()])
    return documents


def split_rows(table: pa.Table, data: DataConfig) -> dict[str, Rows]:
    """Row numbers of the `train` and the `eval` split, in the order in which they are tokenised."""
    rows: dict[str, Rows] = {}
    if data.split_method == "hash":
        held_out = np.array([_is_held_out(key, data.eval_fraction) for key in _keys(table, data)], dtype=bool)
        rows = {"train": np.flatnonzero(~held_out), "eval": np.flatnonzero(held_out)}
    else:
        from datasets import Dataset

        whole = Dataset.from_dict({"row": np.arange(len(table))})
        with contextlib.suppress(ValueError):  # too few records
            # The library itself, so that the rows are those of the guide for every version of it.
            parts = whole.train_test_split(data.eval_fraction, seed=data.seed)
            rows = {"train": np.asarray(parts["train"]["row"]), "eval": np.asarray(parts["test"]["row"])}
    if not rows or not all(map(len, rows.values())):
        raise DataError(
            f"data.eval_fraction {data.eval_fraction} cannot split {len(table)} records: one of the splits would be "
            "empty; take more records, or change data.eval_fraction or data.split_method",
            field="data.eval_fraction",
        )
    return rows


def _texts(table: pa.Table, path: str) -> Iterator[list[Any]]:
    column = column_of(path, table.column_names)
    inner = path[len(column) + 1 :].split(".") if path != column else []
    for value in table.column(column).to_pylist():
        yield list(_reach(value, inner))


def _reach(value: Any, path: Sequence[str]) -> Iterator[Any]:
    """The values at a path, through lists on the way; nulls are left out."""
    if isinstance(value, list):
        for item in value:
            yield from _reach(item, path)
    elif value is not None and path:
        yield from _reach(value.get(path[0]), path[1:])
    elif value is not None:
        yield value


def _keys(table: pa.Table, data: DataConfig) -> Iterator[str]:
    for values in _texts(table, data.id or data.text):
        yield " ".join(map(str, values))


def _is_held_out(key: str, fraction: float) -> bool:
    """Whether a record is in the eval split: by its key alone, so at every size of the data alike."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64

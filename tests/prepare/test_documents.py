"""Documents of records, and the split."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clm_dist.config import DataConfig
from clm_dist.errors import DataError
from clm_dist.prepare.documents import documents_of, split_rows


def data(**settings: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "builtin"} | settings)


NESTED = [
    {"id": "a", "answers": {"text": ["one", "two"]}},
    {"id": "b", "answers": {"text": []}},
    {"id": "c", "answers": {"text": ["", None, "three"]}},
    {"id": "d", "answers": None},
    {"id": "e", "answers": {"text": ["  "]}},
]


def test_nested_lists_are_joined_as_the_guide_joins_them() -> None:
    documents = documents_of(pa.Table.from_pylist(NESTED), data(text="answers.text"))
    # The guide's " ".join keeps empty answers; nulls, which it cannot join, are left out.
    assert documents == [["one two"], [], [" three"], [], []]


def test_items_become_documents_of_their_own_without_a_joint() -> None:
    documents = documents_of(pa.Table.from_pylist(NESTED), data(text="answers.text", join=None))
    assert documents == [["one", "two"], [], ["three"], [], []]


def test_the_three_shapes_of_eli5() -> None:
    struct_of_lists = [{"answers": {"text": ["one", "two"]}}]
    list_of_structs = [{"answers": [{"text": "one"}, {"text": "two"}]}]
    for rows in (struct_of_lists, list_of_structs):
        assert documents_of(pa.Table.from_pylist(rows), data(text="answers.text")) == [["one two"]]
    assert documents_of(pa.table({"answer": ["one two"]}), data(text="answer")) == [["one two"]]
    assert documents_of(pa.table({"answers.text": [["one", "two"]]}), data(text="answers.text")) == [["one two"]]


def test_random_split_is_that_of_datasets_row_for_row() -> None:
    datasets = pytest.importorskip("datasets")
    table = pa.table({"text": [f"t{i}" for i in range(1003)]})
    rows = split_rows(table, data(eval_fraction=0.2, seed=42))
    theirs = datasets.Dataset(table).train_test_split(test_size=0.2, seed=42)
    assert [f"t{i}" for i in rows["train"]] == theirs["train"]["text"][:]
    assert [f"t{i}" for i in rows["eval"]] == theirs["test"]["text"][:]
    assert not np.array_equal(rows["eval"], split_rows(table, data(seed=43))["eval"])


def test_a_record_stays_on_its_side_of_the_hash_split_at_every_size() -> None:
    table = pa.table({"id": [f"q{i}" for i in range(5000)], "text": ["x"] * 5000})
    settings = data(split_method="hash", id="id", eval_fraction=0.2)
    whole = split_rows(table, settings)
    part = split_rows(table.slice(1000, 500), settings)
    assert set(part["eval"] + 1000) == {row for row in whole["eval"] if 1000 <= row < 1500}
    assert np.array_equal(np.sort(np.concatenate([whole["train"], whole["eval"]])), np.arange(5000))
    # 5,000 draws with probability 0.2: 1,000 give or take 4 standard deviations.
    assert abs(len(whole["eval"]) - 1000) < 4 * 28.3


@pytest.mark.parametrize("method", ["random", "hash"])
def test_too_few_records_to_split(method: str) -> None:
    with pytest.raises(
        DataError, match=r"data.eval_fraction 0.2 cannot split 1 records: .* take more records"
    ) as caught:
        split_rows(pa.table({"text": ["one"]}), data(split_method=method))
    assert caught.value.field == "data.eval_fraction"

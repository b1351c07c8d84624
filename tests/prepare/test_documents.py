"""Documents of records, and the split."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clm_dist.config.data import DataConfig
from clm_dist.errors import DataError
from clm_dist.prepare.documents import Skip, documents_of, held_out
from clm_dist.prepare.fields import select_fields
from clm_dist.prepare.sources import Slice
from clm_dist.prepare.splits import split_records
from tests.support.reading import texts_of


def data(**settings: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "builtin"} | settings)


def documents(records: list[dict[str, Any]] | pa.Table, **settings: Any) -> list[list[str]]:
    table = records if isinstance(records, pa.Table) else pa.Table.from_pylist(records)
    return texts_of(select_fields(table, data(**settings), "the test"), data(**settings))


NESTED = [
    {"id": "a", "answers": {"text": ["one", "two"]}},
    {"id": "b", "answers": {"text": []}},
    {"id": "c", "answers": {"text": ["", None, "three"]}},
    {"id": "d", "answers": None},
    {"id": "e", "answers": {"text": ["  "]}},
]


def test_nested_lists_are_joined_as_the_guide_joins_them() -> None:
    # The guide's " ".join keeps empty answers; nulls, which it cannot join, are left out.
    assert documents(NESTED, text="answers.text") == [["one two"], [], [" three"], [], []]


def test_items_become_documents_of_their_own_without_a_joint() -> None:
    assert documents(NESTED, text="answers.text", join=None) == [["one", "two"], [], ["three"], [], []]


def test_the_shapes_of_eli5() -> None:
    struct_of_lists = [{"answers": {"text": ["one", "two"]}}]
    list_of_structs = [{"answers": [{"text": "one"}, {"text": "two"}]}]
    for rows in (struct_of_lists, list_of_structs):
        assert documents(rows, text="answers.text") == [["one two"]]
    assert documents(pa.table({"answer": ["one two"]}), text="answer") == [["one two"]]
    assert documents(pa.table({"answers.text": [["one", "two"]]}), text="answers.text") == [["one two"]]


@pytest.mark.parametrize("join", [" ", "\n\n", "", "é"])
def test_joining_is_python_s_join(join: str) -> None:
    generator = np.random.default_rng(0)
    words = ["", "a", "bé", "\U0001f600 c", " ", "d\n"]
    lists = [[words[i] for i in generator.integers(0, 6, generator.integers(0, 5))] for _ in range(500)]
    expected = [[join.join(items)] if join.join(items).strip() else [] for items in lists]
    table = pa.table({"text": pa.array(lists, pa.list_(pa.string()))})
    assert documents(table, join=join) == expected
    assert documents(table.slice(100, 50), join=join) == expected[100:150]


TEMPLATE = [
    {"title": "Why?", "answers": {"text": ["one", "two"]}},
    {"title": None, "answers": {"text": ["three"]}},
    {"title": "How?", "answers": {"text": []}},
    {"title": " ", "answers": {"text": [""]}},
]


def test_a_template_is_filled_with_the_fields_of_a_record() -> None:
    assert documents(TEMPLATE, text="{title}\n\n{answers.text}!") == [
        ["Why?\n\none two!"],
        ["\n\nthree!"],
        ["How?\n\n!"],
        [],  # a template of nothing but blanks is no document
    ]


def test_a_template_without_a_joint_gives_a_document_an_answer() -> None:
    assert documents(TEMPLATE, text="Q: {title} A: {answers.text}", join=None) == [
        ["Q: Why? A: one", "Q: Why? A: two"],
        ["Q:  A: three"],
        [],
        [],
    ]


def test_lists_of_different_length_are_no_documents_of_their_own() -> None:
    records = [{"a": ["x", "y"], "b": ["z"]}]
    assert documents(records, text="{a}{b}") == [["x yz"]]
    with pytest.raises(DataError, match=r"b and a have other numbers of items, and data.join null"):
        documents(records, text="{a}{b}", join=None)


SCORED: list[dict[str, Any]] = [
    {"answers": {"text": ["good", "bad"], "score": [5, 1]}},
    {"answers": {"text": ["bad"], "score": [0]}},
    {"answers": {"text": ["none", "fine"], "score": [None, 2]}},
    {"answers": {"text": [], "score": []}},
]


TURNS = [
    {"title": "a", "messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yes"}]},
    {"title": "b", "messages": []},
    {"title": "c", "messages": [{"role": "user", "content": None}, {"role": None, "content": None}]},
]


def test_a_template_over_a_list_of_records_is_filled_item_by_item() -> None:
    template = "<{messages.role}> {messages.content}"
    assert documents(TURNS, text=template, join="|") == [["<user> hi|<bot> yes"], [], ["<user> "]]
    lists = [{"messages": {"role": ["user", "bot"], "content": ["hi", "yes"]}}]
    assert documents(lists, text=template, join="|") == [["<user> hi|<bot> yes"]]
    deeper = [{"m": [{"who": {"role": "user"}, "content": "hi"}, {"who": {"role": "bot"}, "content": "yes"}]}]
    assert documents(deeper, text="<{m.who.role}> {m.content}", join="|") == [["<user> hi|<bot> yes"]]
    # One field of a list is joined, as before.
    assert documents(TURNS[:2], text="{title}: {messages.content}", join="|") == [["a: hi|yes"], ["b: "]]
    assert documents(TURNS[:1], text="{title} {messages.role}: {messages.content}", join=None) == [
        ["a user: hi", "a bot: yes"]
    ]


def test_items_are_scored_before_they_are_filled_in() -> None:
    rows = [{"m": [{"q": "a", "a": "b", "s": 1}, {"q": "c", "a": "d", "s": 5}]}]
    assert documents(rows, text="{m.q}={m.a}", score="m.s", min_score=3) == [["c=d"]]


def test_a_template_that_is_in_and_beside_a_list_is_refused() -> None:
    with pytest.raises(DataError, match=r"messages.role and messages.content are filled in item by item, and title is"):
        documents(TURNS, text="{title} {messages.role}: {messages.content}")
    uneven = [{"m": {"q": ["a", "b"], "a": ["c"]}}]
    with pytest.raises(DataError, match=r"m.a and m.q have other numbers of items; name fields of one list"):
        documents(uneven, text="{m.q}={m.a}")


def test_answers_with_a_low_score_are_left_out_and_counted() -> None:
    settings: dict[str, Any] = {"text": "answers.text", "score": "answers.score", "min_score": 2}
    assert documents(SCORED, **settings) == [["good"], [], ["fine"], []]
    found = documents_of(select_fields(pa.Table.from_pylist(SCORED), data(**settings), ""), data(**settings))
    assert found.skipped.tolist() == [Skip.USED, Skip.LOW_SCORE, Skip.USED, Skip.EMPTY]
    titled = [record | {"title": "t"} for record in SCORED]
    assert documents(titled, **(settings | {"text": "{title}: {answers.text}"})) == [
        ["t: good"],
        [],
        ["t: fine"],
        ["t: "],
    ]
    assert documents([{"text": "a", "s": 1}, {"text": "b", "s": 3}], score="s", min_score=2) == [[], ["b"]]


def test_scores_that_do_not_go_with_the_texts() -> None:
    records = [{"answers": {"text": ["a", "b"], "score": [1]}, "s": 1}]
    with pytest.raises(DataError, match=r"data.score answers.score has 1 values for 2 texts"):
        documents(records, text="answers.text", score="answers.score", min_score=1)
    with pytest.raises(DataError, match=r"data.score s is not beside a text of data.text"):
        documents(records, text="answers.text", score="s", min_score=1)
    with pytest.raises(DataError, match=r"data.score answers.text is string in the test, not a number"):
        documents(records, text="answers.text", score="answers.text", min_score=1)


def test_url_placeholders_stay_as_they_come() -> None:
    assert documents([{"text": "see _URL_0_ and _URL_1_"}]) == [["see _URL_0_ and _URL_1_"]]


def test_random_split_is_that_of_datasets_row_for_row() -> None:
    datasets = pytest.importorskip("datasets")
    table = pa.table({"text": [f"t{i}" for i in range(1003)]})
    everything = np.zeros(1003, bool)
    rows = split_records(everything, Slice("train"), data(eval_fraction=0.2, seed=42))
    theirs = datasets.Dataset(table).train_test_split(test_size=0.2, seed=42)
    assert [f"t{i}" for i in rows["train"]] == theirs["train"]["text"][:]
    assert [f"t{i}" for i in rows["eval"]] == theirs["test"]["text"][:]
    assert not np.array_equal(rows["eval"], split_records(everything, Slice("train"), data(seed=43))["eval"])


def test_a_record_stays_on_its_side_of_the_hash_split_at_every_size() -> None:
    table = pa.table({"id": [f"q{i}" for i in range(5000)], "text": ["x"] * 5000})
    settings = data(split_method="hash", id="id", eval_fraction=0.2)
    whole = held_out(table, settings)
    assert np.array_equal(held_out(table.slice(1000, 500), settings), whole[1000:1500])
    part = split_records(whole, Slice("train[1000:1500]", 1000, 1500), settings)
    everything = split_records(whole, Slice("train"), settings)
    assert set(part["eval"]) == {row for row in everything["eval"] if 1000 <= row < 1500}
    assert np.array_equal(np.sort(np.concatenate(list(everything.values()))), np.arange(5000))
    # 5,000 draws with probability 0.2: 1,000 give or take 4 standard deviations.
    assert abs(int(whole.sum()) - 1000) < 4 * 28.3


def test_the_hash_of_a_text_does_not_depend_on_the_joint() -> None:
    table = pa.table({"text": [["a", "b"], ["c"]] * 50})
    one, other = (held_out(table, data(split_method="hash", join=join)) for join in (" ", None))
    assert np.array_equal(one, other)
    numbers = pa.table({"id": np.arange(100), "text": ["x"] * 100})
    names = pa.table({"id": [str(i) for i in range(100)], "text": ["x"] * 100})
    settings = data(split_method="hash", id="id")
    assert np.array_equal(held_out(numbers, settings), held_out(names, settings))


@pytest.mark.parametrize("method", ["random", "hash"])
def test_too_few_records_to_split(method: str) -> None:
    with pytest.raises(
        DataError, match=r"data.eval_fraction 0.2 cannot split 1 records: .* take more records"
    ) as caught:
        split_records(np.zeros(1, bool), Slice("train"), data(split_method=method))
    assert caught.value.field == "data.eval_fraction"

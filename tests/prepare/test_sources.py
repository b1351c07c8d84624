"""Records from files, the built-in corpus and slices; what broken data says."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from clm_dist.config.data import DataConfig
from clm_dist.errors import ConfigError, DataError, StorageError
from clm_dist.files.hashes import HashMemory
from clm_dist.prepare import builtin
from clm_dist.prepare.builtin import load_builtin, paragraphs_of
from clm_dist.prepare.identity import source_identity
from clm_dist.prepare.partitions import read_partition
from clm_dist.prepare.sources import open_source
from tests.support.reading import EMPTY_FILES, LARGE, load_records, texts_of

RECORDS: list[dict[str, Any]] = [
    {"q_id": f"q{i}", "answers": {"text": [f"answer {i}", "b"], "score": [1, 2]}} for i in range(10)
]


def files(path: Path | str | list[str], **settings: Any) -> DataConfig:
    given = [str(p) for p in path] if isinstance(path, list) else str(path)
    return DataConfig.model_validate(
        {"source": "files", "path": given, "text": "answers.text", "id": "q_id", "split_method": "hash"} | settings
    )


def write_jsonl(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_kinds(directory: Path, records: list[dict[str, Any]]) -> list[Path]:
    """The records in every kind of file."""
    table = pa.Table.from_pylist(records)
    write_jsonl(directory / "a.jsonl", records)
    content = (directory / "a.jsonl").read_bytes()
    (directory / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (directory / "c.jsonl.bz2").write_bytes(bz2.compress(content))
    with pa.CompressedOutputStream(str(directory / "d.jsonl.zst"), "zstd") as zipped:
        zipped.write(content)
    (directory / "e.json").write_text(json.dumps(records, indent=1))
    (directory / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + content.rstrip(b"\n"))
    pa.parquet.write_table(table, directory / "g.parquet", row_group_size=3)
    pa.parquet.write_table(table, directory / "h.parquet")
    pa.feather.write_feather(table, str(directory / "i.arrow"), compression="lz4", chunksize=3)
    with pa.OSFile(str(directory / "j.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return sorted(directory.iterdir())


@pytest.mark.parametrize("size", [LARGE, 1000, 100, 1])
def test_every_kind_of_file_gives_the_same_records_however_it_is_cut(tmp_path: Path, size: int) -> None:
    for file in write_kinds(tmp_path, RECORDS):
        loaded = load_records(files(file), size).to_pylist()
        assert [r["answers"]["text"] for r in loaded] == [r["answers"]["text"] for r in RECORDS], file
        assert [r["q_id"] for r in loaded] == [r["q_id"] for r in RECORDS], file


def test_partitions_are_as_small_as_they_are_asked_to_be(tmp_path: Path) -> None:
    records = [{"q_id": f"q{i}", "answers": {"text": [f"{i} " * 25]}} for i in range(1000)]
    for file in write_kinds(tmp_path, records):
        data = files(file)
        tables = [read_partition(partition, data) for partition in open_source(data).partitions(10_000)]
        # A row group is read whole by one task, up to four times that size.
        assert max(table.nbytes for table in tables) < (45_000 if file.name == "h.parquet" else 21_000), file


def test_lines_that_are_longer_than_a_partition(tmp_path: Path) -> None:
    texts = ["a" * 5000, "b", "", "c" * 7000, "d\r", "e"]
    (tmp_path / "a.txt").write_bytes("\n".join(texts).encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    expected = [text.rstrip("\r") for text in texts]
    for size in (1, 7, 1000, 4999, 5000, 5001, 5002, 5003, LARGE):
        for name in ("a.txt", "a.txt.gz"):
            read = load_records(text_of(tmp_path / name), size).column("text").to_pylist()
            assert read == expected, (size, name)


def test_flat_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\nq,"one, two\nthree"\n')
    (tmp_path / "a.tsv").write_text("question\tanswer\nq\tone\n")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    csv = files(tmp_path / "a.csv", text="answer", id=None)
    assert load_records(csv).to_pylist() == [{"answer": "one, two\nthree"}]
    tsv = files(tmp_path / "a.tsv", text="answer", id=None)
    assert load_records(tsv).to_pylist() == [{"answer": "one"}]
    text = files(tmp_path / "a.txt", text="text", id=None)
    assert load_records(text).column("text").to_pylist() == ["one", "", "two"]


def test_globs_directories_and_lists_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "b.jsonl", RECORDS[5:])
    write_jsonl(tmp_path / "a.jsonl", RECORDS[:3])
    write_jsonl(tmp_path / "sub" / "c.jsonl", RECORDS[3:5])
    (tmp_path / "notes.pdf").write_text("")

    def ids(path: Any) -> list[str]:
        found: list[str] = load_records(files(path)).column("q_id").to_pylist()
        return found

    assert ids(tmp_path) == ["q0", "q1", "q2", "q5", "q6", "q7", "q8", "q9", "q3", "q4"]
    assert ids(f"{tmp_path}/*.jsonl") == ["q0", "q1", "q2", "q5", "q6", "q7", "q8", "q9"]
    assert ids(f"{tmp_path}/**/c.jsonl") == ["q3", "q4"]
    assert ids([tmp_path / "sub", tmp_path / "a.jsonl"]) == ["q3", "q4", "q0", "q1", "q2"]


def test_files_whose_other_columns_differ_are_read_together(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [RECORDS[0] | {"extra": 1}])
    b = write_jsonl(tmp_path / "b.jsonl", [RECORDS[1] | {"extra": "text"}])
    assert len(load_records(files([str(a), str(b)]))) == 2


@pytest.mark.parametrize(
    ("split", "first", "count"),
    [("train", 0, 10), ("train[:3]", 0, 3), ("train[7:]", 7, 3), ("train[20%:50%]", 2, 3), ("train[-2:]", 8, 2)],
)
def test_slices_are_those_of_datasets(tmp_path: Path, split: str, first: int, count: int) -> None:
    loaded = load_records(files(write_jsonl(tmp_path / "a.jsonl"), split=split)).column("q_id").to_pylist()
    assert loaded == [f"q{i}" for i in range(first, first + count)]


def test_the_built_in_corpus_is_python_s_reference() -> None:
    table = load_records(DataConfig(source="builtin", id="topic", split_method="hash"))
    assert len(table) > 50
    assert "import" in table.column("topic").to_pylist()


def test_paragraphs_of_the_built_in_corpus_are_its_prose() -> None:
    text = """The "with" statement
********************

The "with" statement is used to *wrap* the
execution of a **block**.

   with_stmt ::= "with" suite

1. The context manager’s "__enter__()" is
   called, and "*args" stays. The "**" operator: *x* "**" *y*.

   with A() as a:
       SUITE

+------+-------+
| A b c d. | e |
+------+-------+

   Note:

     * It returns without an error:
"""
    assert paragraphs_of(text) == [
        "The with statement is used to wrap the execution of a block.",
        "The context manager’s __enter__() is called, and *args stays. The ** operator: x ** y.",
        "It returns without an error:",
    ]
    table = load_records(DataConfig(source="builtin", text="paragraphs"))
    paragraphs = [one for of_topic in table.column("paragraphs").to_pylist() for one in of_topic]
    assert len(paragraphs) > 1000
    assert not [one for one in paragraphs if "\n" in one or "  " in one or " ::= " in one]
    letters = sum(c.isalpha() or c == " " for one in paragraphs for c in one)
    assert letters > 0.93 * sum(map(len, paragraphs))


def test_the_paragraphs_change_no_store_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data.topics import topics

    def identity(**settings: Any) -> dict[str, Any]:
        return source_identity(DataConfig(source="builtin", **settings), HashMemory(tmp_path / "known.json"))

    counts = [len(topics), sum(map(len, topics.values()))]
    of_text = {"builtin": "pydoc_data.topics", "topics": counts, "split": "train"}
    assert identity() == identity(text="topic") == of_text
    made = identity(text="paragraphs")
    assert made == identity(text="{topic}: {paragraphs}") == of_text | {"paragraphs": made["paragraphs"]}
    # Another way to make them is another store.
    monkeypatch.setattr(builtin, "_FEWEST_SPACES", 9)
    load_builtin.cache_clear()
    try:
        assert identity(text="paragraphs") != made
    finally:
        load_builtin.cache_clear()


def error_of(data: DataConfig, size: int = LARGE) -> DataError | ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_records(data, size)
    return caught.value


def test_a_path_that_matches_nothing(tmp_path: Path) -> None:
    error = error_of(files(tmp_path / "*.jsonl"))
    assert "matches no file" in str(error)
    assert (error.field, error.exit_code) == ("data.path", 2)
    assert "is a directory with no file of a known kind" in str(error_of(files(tmp_path)))
    (tmp_path / "a.pdf").write_text("")
    assert "unknown kind of file; known are .jsonl" in str(error_of(files(tmp_path / "a.pdf")))


@pytest.mark.parametrize(
    ("broken", "problem"),
    [('{"q_id": "x", ', "not a JSON record"), ("[1]", "list where an object is needed"), ("nonsense", "not a JSON")],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_broken_line_is_named_with_its_number(tmp_path: Path, name: str, broken: str, problem: str) -> None:
    lines = [json.dumps(record) for record in RECORDS]
    lines.insert(4, "")
    lines.insert(7, broken)
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt") as file:
        file.write("\n".join(lines))
    for size in (LARGE, 100, 1):
        error = error_of(files(tmp_path / name), size)
        assert str(error).startswith(f"{tmp_path / name}:8: ")
        assert problem in str(error)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS * 100))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert str(error_of(files(tmp_path / "a.jsonl.gz"))).startswith(f"{tmp_path / 'a.jsonl.gz'}: cannot be read")
    (tmp_path / "a.parquet").write_bytes(b"nonsense")
    assert str(error_of(files(tmp_path / "a.parquet"))).startswith(f"{tmp_path / 'a.parquet'}: cannot be read")
    (tmp_path / "a.txt").write_bytes(b"ok\n\xff\xfe\n")


def test_a_field_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    error = error_of(files(path, text="answers.body"))
    assert str(error) == (f"data.text answers.body is not in {path}; its fields are: q_id, answers.text, answers.score")
    assert error.field == "data.text"
    error = error_of(files(path, id="key"))
    assert str(error).endswith("answers.score; null hashes the text instead")
    assert error.field == "data.id"
    # Only the hash split reads the id.
    assert load_records(files(path, id="key", split_method="random")).column_names == ["answers"]


def test_a_split_that_files_do_not_have(tmp_path: Path) -> None:
    error = error_of(files(write_jsonl(tmp_path / "a.jsonl"), split="test[:3]"))
    assert "files have one split, train" in str(error)
    assert error.field == "data.split"


def test_a_data_set_that_is_not_reachable() -> None:
    error = error_of(DataConfig(source="hub", dataset="nobody/nothing-at-all", text="text"))
    assert "data.dataset nobody/nothing-at-all is not reachable on the Hub" in str(error)
    assert "--set data.source=files" in str(error)
    assert error.field == "data.dataset"


def text_of(path: Path | list[str], **settings: Any) -> DataConfig:
    return files(path, text="text", id=None, **settings)


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    contents = {
        "a.jsonl": '{"text": "a"}\n{"text": "caf\xe9"}\n',
        "a.csv": "text\ncaf\xe9\n",
        "b.csv": "n,text\n1,caf\xe9\n",
        "a.txt": "fine\ncaf\xe9\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode("latin1"))
        for size in (LARGE, 5):
            error = error_of(text_of(tmp_path / name), size)
            assert str(error).startswith(f"{tmp_path / name}:2: not UTF-8; set data.encoding to "), name
    (tmp_path / "head.csv").write_bytes("id\xe9,text\n1,a\n".encode("latin1"))
    assert f"{tmp_path / 'head.csv'}:1: not UTF-8" in str(error_of(text_of(tmp_path / "head.csv")))
    (tmp_path / "utf16.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    assert f"{tmp_path / 'utf16.jsonl'}: UTF-16, not UTF-8" in str(error_of(text_of(tmp_path / "utf16.jsonl")))
    broken = pa.array([b"caf\xe9"]).view(pa.string())
    pa.parquet.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert str(error_of(text_of(tmp_path / "a.parquet"))).startswith(f"{tmp_path / 'a.parquet'}: not UTF-8; save")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ('{"text": 5}', "text is a number, but text in {unit} 1; give it one type"),
        ('{"text": "a", "text": "b"}', "not a JSON record: the key text is there twice; mend or remove the {unit}"),
        ('{"text": "\\ud800"}', "not a JSON record: 'utf-8' codec can't encode character '\\ud800'"),
    ],
)
def test_records_that_do_not_go_together_are_named(tmp_path: Path, record: str, problem: str) -> None:
    records = ['{"text": "a"}', '{"text": "a", "more": [{"n": 1}]}', '{"text": null}', record]
    (tmp_path / "a.jsonl").write_text("\n\n".join(records))
    error = error_of(text_of(tmp_path / "a.jsonl"))
    assert str(error).startswith(f"{tmp_path / 'a.jsonl'}:7: {problem.format(unit='line').replace(' 2;', ' 3;')}")
    if "twice" not in problem:  # what Python reads from an array has each key once
        (tmp_path / "a.json").write_text(f"\n  [{', '.join(records)}]")
        error = error_of(text_of(tmp_path / "a.json"))
        assert str(error).startswith(f"{tmp_path / 'a.json'}: record 4: {problem.format(unit='record')}")


def test_a_type_that_changes_in_another_partition_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 50 + '{"text": 5}\n')
    error = error_of(text_of(tmp_path / "a.jsonl"), 10)
    assert str(error) == (
        f"{tmp_path / 'a.jsonl'}:51: text is a number, but text in the records before; give it one type throughout"
    )


def test_fields_that_nobody_reads_may_have_any_type(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "more": 1}\n{"text": "b", "more": "x"}\n{"text": "c"}\n')
    assert load_records(text_of(tmp_path / "a.jsonl")).to_pylist() == [{"text": "a"}, {"text": "b"}, {"text": "c"}]


def test_a_field_that_a_later_file_lacks_is_named(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"body": "a"}])
    assert str(error_of(text_of([str(a), str(b)]))) == f"data.text text is not in {b}; its fields are: body"


def test_texts_that_come_late_are_found(tmp_path: Path) -> None:
    records = [{"answers": {"text": [], "a": 1}}] * 5 + [{"answers": None}] + [{"answers": {"text": ["late"], "a": 2}}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    loaded = load_records(files(path, id=None), 40).column("answers").to_pylist()
    assert loaded[-1] == {"text": ["late"]}


def test_json_arrays(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    for before in ("", " \n\t", "\ufeff"):
        array.write_text(before + '[{"text": "a"},\n{"text": "b"}]')
        assert load_records(text_of(array)).column("text").to_pylist() == ["a", "b"]
    array.write_text('[{"text": "a"},\n{"text": "b"')
    assert f"{array}:2: not a JSON array: Expecting ',' delimiter" in str(error_of(text_of(array)))
    array.write_text('["a"]')
    assert f"{array}: record 1: not a JSON record: str where an object is needed" in str(error_of(text_of(array)))


def test_an_empty_file_does_no_harm_beside_others(tmp_path: Path) -> None:
    for name, content in EMPTY_FILES.items():
        (tmp_path / name).write_text(content)
        assert len(load_records(text_of(tmp_path / name))) == 0
    (tmp_path / "z.txt").write_text("one\ntwo\n")
    assert load_records(text_of(tmp_path)).column("text").to_pylist() == ["one", "two"]


def test_a_text_that_is_no_text_is_named_with_the_fields_that_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": [1], "title": "a", "body": {"long": ["b"]}}\n')
    error = error_of(files(tmp_path / "a.jsonl", text="n", id=None))
    assert str(error) == (
        f"data.text n is int64 in {tmp_path / 'a.jsonl'}, not text; its fields of text are: title, body.long"
    )
    assert error.field == "data.text"
    # A CSV file knows no types: its numbers are text where text is asked for.
    (tmp_path / "a.csv").write_text("text\n007\n")
    (tmp_path / "b.csv").write_text("text\nbond\n")
    loaded = load_records(text_of([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]))
    assert loaded.column("text").to_pylist() == ["007", "bond"]


def test_files_whose_texts_differ_in_type(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": ["a"]}])
    error = error_of(text_of([str(a), str(b)]))
    assert str(error) == (f"{b}:1: text is a list, but text in the records before; give it one type throughout")


def test_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text,n,n\na,b,1,2\n")
    pa.parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    for file in (tmp_path / "a.csv", tmp_path / "a.parquet"):
        assert str(error_of(text_of(file))) == f"{file} has several columns text; give each a name of its own"
    # Those that nobody reads may have one name.
    (tmp_path / "a.csv").write_text("text,n,n\na,1,2\n")
    assert load_records(text_of(tmp_path / "a.csv")).to_pylist() == [{"text": "a"}]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.string_view(), "a"),
        (pa.large_string(), "a"),
        (pa.dictionary(pa.int32(), pa.string()), "a"),
        (pa.list_(pa.string_view()), ["a"]),
        (pa.large_list(pa.string_view()), ["a"]),
        (pa.struct([("text", pa.list_(pa.string_view()))]), {"text": ["a"]}),
    ],
    ids=str,
)
def test_every_arrow_type_of_text(tmp_path: Path, kind: Any, value: Any) -> None:
    pa.feather.write_feather(pa.table({"a": pa.array([value] * 9, kind)}), str(tmp_path / "a.arrow"), "uncompressed")
    data = files(tmp_path / "a.arrow", text="a.text" if isinstance(value, dict) else "a", split_method="random")
    assert texts_of(load_records(data), data) == [["a"]] * 9


@pytest.mark.parametrize("path", ["~nouser/x", "a" * 5000, "/" + "a" * 5000])
def test_a_path_that_cannot_be(path: str) -> None:
    error = error_of(files(path))
    assert str(error).startswith(f"data.path {path[:50]}")
    assert "give a file, a glob or a directory" in str(error)
    assert len(str(error)) < 400
    assert error.field == "data.path"


def test_a_file_whose_content_cannot_be_read_is_named(tmp_path: Path) -> None:
    # Opens for everybody, and gives an I/O error to everybody.
    file = tmp_path / "a.jsonl"
    file.symlink_to("/proc/self/mem")
    with pytest.raises(StorageError, match=f"{file}: cannot be read: Input/output error; .* data.path") as caught:
        source_identity(files(file), HashMemory(tmp_path / "digests.json"))
    assert caught.value.field == "data.path"


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_broken_memory_of_digests_is_written_anew(tmp_path: Path, content: str) -> None:
    data = files(write_jsonl(tmp_path / "a.jsonl"))
    identity = source_identity(data, HashMemory(tmp_path / "digests.json"))
    whole = (tmp_path / "digests.json").read_text()
    (tmp_path / "digests.json").write_text(content)
    assert source_identity(data, HashMemory(tmp_path / "digests.json")) == identity
    assert (tmp_path / "digests.json").read_text() == whole


def test_numbers_and_nesting_that_no_type_holds(tmp_path: Path) -> None:
    deep = "[" * 5000 + "]" * 5000
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": 123456789012345678901234567890}\n')
    assert load_records(text_of(path)).to_pylist() == [{"text": "a"}]
    path.write_text(f'{{"text": "a", "n": {deep}}}\n')
    assert str(error_of(text_of(path))).startswith(f"{path}:1: not a JSON record: it is nested too deeply")
    path.write_text('{"text": "a", "id": 1}\n{"text": "a", "id": 123456789012345678901234567890}\n')
    assert str(error_of(files(path, text="text", id="id"))).startswith(f"{path}")


def test_a_large_cell_of_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "a\n" * 10 + "x" * 6_000_000 + "\nb\n")
    for size in (LARGE, 1000):
        assert len(load_records(text_of(path), size)) == 12


def test_a_flattened_column_of_parquet_is_cut_like_any_other(tmp_path: Path) -> None:
    table = pa.table({"answers.text": pa.array([[f"{i} " * 25] for i in range(1000)])})
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    partitions = list(open_source(files(tmp_path / "a.parquet", id=None)).partitions(5_000))
    assert len(partitions) > 10
    assert len(load_records(files(tmp_path / "a.parquet", id=None), 5_000)) == 1000


def test_parts_of_a_split_cannot_be_added_up(tmp_path: Path) -> None:
    error = error_of(files(write_jsonl(tmp_path / "a.jsonl"), split="train[:2]+train[4:]"))
    assert "data.split train[:2]+train[4:]: parts cannot be added up; write one split or a slice of it" in str(error)

"""Records from files, the built-in corpus and slices; what broken data says."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from clm_dist.config import DataConfig
from clm_dist.errors import ConfigError, DataError
from clm_dist.prepare.sources import load_records

RECORDS: list[dict[str, Any]] = [
    {"q_id": f"q{i}", "answers": {"text": [f"answer {i}", "b"], "score": [1, 2]}} for i in range(10)
]


def files(path: Path | str | list[str], **settings: Any) -> DataConfig:
    given = [str(p) for p in path] if isinstance(path, list) else str(path)
    return DataConfig.model_validate(
        {"source": "files", "path": given, "text": "answers.text", "id": "q_id"} | settings
    )


def write_jsonl(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    write_jsonl(tmp_path / "a.jsonl")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as zipped:
        zipped.write((tmp_path / "a.jsonl").read_text())
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as zipped:
        zipped.write((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "d.json").write_text(json.dumps(RECORDS, indent=1))
    pa.parquet.write_table(table, tmp_path / "e.parquet")
    pa.feather.write_feather(table, str(tmp_path / "f.arrow"), compression="uncompressed")
    with pa.OSFile(str(tmp_path / "g.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for file in sorted(tmp_path.iterdir()):
        loaded = load_records(files(file)).to_pylist()
        assert [r["answers"]["text"] for r in loaded] == [r["answers"]["text"] for r in RECORDS], file
        assert [r["q_id"] for r in loaded] == [r["q_id"] for r in RECORDS], file


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
    table = load_records(DataConfig(source="builtin", id="topic"))
    assert len(table) > 50
    assert "import" in table.column("topic").to_pylist()


def error_of(data: DataConfig) -> DataError | ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_records(data)
    return caught.value


def test_a_path_that_matches_nothing(tmp_path: Path) -> None:
    error = error_of(files(tmp_path / "*.jsonl"))
    assert "matches no file" in str(error)
    assert (error.field, error.exit_code) == ("data.path", 2)
    assert "is a directory with no file of a known kind" in str(error_of(files(tmp_path)))
    (tmp_path / "a.pdf").write_text("")
    assert "unknown kind of file; known are .jsonl" in str(error_of(files(tmp_path / "a.pdf")))
    assert "URLs are not supported yet" in str(error_of(files("s3://bucket/a.jsonl")))


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
    error = error_of(files(tmp_path / name))
    assert str(error).startswith(f"{tmp_path / name}:8: ")
    assert problem in str(error)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS * 100))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert str(error_of(files(tmp_path / "a.jsonl.gz"))).startswith(f"{tmp_path / 'a.jsonl.gz'}: cannot be read")
    (tmp_path / "a.parquet").write_bytes(b"nonsense")
    assert str(error_of(files(tmp_path / "a.parquet"))).startswith(f"{tmp_path / 'a.parquet'}: cannot be read")
    (tmp_path / "a.txt").write_bytes(b"ok\n\xff\xfe\n")
    assert "not UTF-8: invalid start byte at byte 3" in str(error_of(files(tmp_path / "a.txt", text="text", id=None)))


def test_a_field_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    error = error_of(files(path, text="answers.body"))
    assert str(error) == (f"data.text answers.body is not in {path}; its fields are: q_id, answers.text, answers.score")
    assert error.field == "data.text"
    assert error_of(files(path, id="key")).field == "data.id"


def test_a_split_that_files_do_not_have(tmp_path: Path) -> None:
    error = error_of(files(write_jsonl(tmp_path / "a.jsonl"), split="test[:3]"))
    assert "files have one split, train" in str(error)
    assert error.field == "data.split"


def test_a_data_set_that_is_not_reachable() -> None:
    error = error_of(DataConfig(source="hub", dataset="nobody/nothing-at-all", text="text"))
    assert "data.dataset nobody/nothing-at-all is not reachable on the Hub" in str(error)
    assert "--set data.source=files" in str(error)
    assert error.field == "data.dataset"

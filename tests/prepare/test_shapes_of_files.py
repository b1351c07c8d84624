"""CSV with other delimiters, and JSON files that are one object."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from clm_dist.config.data import DataConfig
from clm_dist.errors import ConfigError
from tests.support.reading import LARGE, load_records

SIZES = (1, 30, LARGE)


def data(path: Path | list[str], **settings: Any) -> DataConfig:
    given = path if isinstance(path, list) else str(path)
    return DataConfig.model_validate({"source": "files", "path": given} | settings)


def texts(config: DataConfig, size: int = LARGE) -> list[str]:
    return [record["text"] for record in load_records(config, size).to_pylist()]


def error_of(config: DataConfig) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_records(config)
    return caught.value


@pytest.mark.parametrize("size", SIZES)
def test_csv_has_the_delimiter_that_is_named(tmp_path: Path, size: int) -> None:
    for name, delimiter in (("a.csv", ";"), ("b.csv", "|"), ("c.csv", "\t"), ("d.tsv", ","), ("e.csv", " ")):
        content = f'id{delimiter}text\n1{delimiter}"one{delimiter}two\nthree"\n2{delimiter}four\n'
        (tmp_path / name).write_text(content)
        assert texts(data(tmp_path / name, delimiter=delimiter), size) == [f"one{delimiter}two\nthree", "four"]


def test_a_csv_file_of_another_delimiter_says_which(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id;text\n1;a\n")
    error = error_of(data(tmp_path / "a.csv"))
    assert str(error) == (
        f"data.text text is not in {tmp_path}/a.csv; its fields are: id;text; ';' is between its fields, it "
        "seems: set data.delimiter to it"
    )
    (tmp_path / "a.csv").write_text('id;text\n1;"a, b, c"\n')
    error = error_of(data(tmp_path / "a.csv"))
    assert str(error).startswith(f"{tmp_path}/a.csv: cannot be read: CSV parse error: ")
    assert str(error).endswith("';' is between its fields, it seems: set data.delimiter to it")
    for mark in ("", "\ufeff"):
        (tmp_path / "a.csv").write_text(f"{mark}sep=;\r\nid;text\r\n1;a\r\n")
        assert str(error_of(data(tmp_path / "a.csv"))) == (
            f"{tmp_path}/a.csv: its first line, sep=;, is for Excel, and no record; take that line out, and set "
            "data.delimiter to ';'"
        )
    (tmp_path / "a.csv").write_text("id,text\n1,a,b;c\n")
    assert "delimiter" not in str(error_of(data(tmp_path / "a.csv")))
    (tmp_path / "a.csv").write_text("id,body\n1,a\n")
    assert str(error_of(data(tmp_path / "a.csv"))).endswith("its fields are: id, body")
    (tmp_path / "a.csv").write_text("body\na\n")
    assert str(error_of(data(tmp_path / "a.csv"))).endswith("its fields are: body")


@pytest.mark.parametrize("value", ["", "ab", "\\t", "\u00e9", '"', "\n", "\r", "\0"])
def test_a_delimiter_is_one_character(value: str) -> None:
    with pytest.raises(ValueError, match=r"data.delimiter .* is not one ASCII character that can be between fields"):
        DataConfig(source="files", path="a.csv", delimiter=value)


RECORDS = [{"text": f"record {i}", "n": [i]} for i in range(20)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("indent", [None, 2])
def test_records_are_read_from_the_field_of_an_object(tmp_path: Path, size: int, indent: int | None) -> None:
    path = tmp_path / "a.json"
    for field, value in (
        ("data", {"version": 1, "data": RECORDS}),
        ("a.b.c", {"a": {"b": {"c": RECORDS, "d": []}}}),
        ("a.b", {"a.b": RECORDS}),
    ):
        path.write_text(json.dumps(value, indent=indent))
        assert texts(data(path, field=field), size) == [record["text"] for record in RECORDS], field


def test_a_field_that_is_no_list_of_records_says_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"version": "1", "meta": {"items": [], "n": 1}, "data": RECORDS}
    path.write_text(json.dumps(value))
    error = error_of(data(path, field="rows"))
    assert str(error) == f"data.field rows is not in {path}; its fields are: version, meta.items, meta.n, data"
    assert error.field == "data.field"
    for field, kind in (("version", "text"), ("meta", "an object"), ("meta.n", "a number, true or false")):
        assert str(error_of(data(path, field=field))) == (
            f"data.field {field} is {kind} in {path}, not a list of records; its lists are: meta.items, data"
        )
    path.write_text(json.dumps({f"k{i}": 1 for i in range(50)}))
    assert str(error_of(data(path, field="rows"))).endswith(", k18, k19 and 30 more")
    path.write_text(json.dumps(RECORDS))
    assert f"{path} is a list, not an object; set data.field to null" in str(error_of(data(path, field="data")))
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert f"{path}:2: not a JSON object: Extra data" in str(error_of(data(path, field="data")))
    path.write_text('{"data": ["a"]}')
    assert f"{path}: record 1: not a JSON record: str where" in str(error_of(data(path, field="data")))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_that_is_one_object_is_told_of_the_option(tmp_path: Path, indent: int | None) -> None:
    one, other = tmp_path / "b.json", tmp_path / "a.json"
    one.write_text(json.dumps({"meta": {"n": [1]}, "rows": {"all": RECORDS}}, indent=indent))
    other.write_text('{"text": "a"}\n')
    for path in (one, [str(other), str(one)]):
        error = str(error_of(data(path)))
        assert f"{one}" in error
        assert "is one JSON object" in error
        assert error.endswith("if its records are the list rows.all, set data.field to rows.all")
    # Other objects keep their message.
    one.write_text('{"body": "a", "n": [1]}\n')
    assert str(error_of(data(one))).endswith("its fields are: body, n")
    one.write_text('{"body": "a",\n')
    assert "b.json:1: not a JSON record" in str(error_of(data(one)))


@pytest.mark.parametrize(
    ("option", "name"),
    [({"delimiter": ";"}, "a.txt"), ({"delimiter": ";"}, "a.jsonl"), ({"delimiter": ";"}, "a.parquet")]
    + [({"field": "data"}, name) for name in ("a.jsonl", "a.csv", "a.txt", "a.parquet")],
)
def test_an_option_for_another_kind_of_file_is_refused(tmp_path: Path, option: dict[str, str], name: str) -> None:
    (tmp_path / name).write_text("")
    ((field, value),) = option.items()
    error = error_of(data(tmp_path, **option))
    assert f"data.{field} '{value}' is for " in str(error)
    assert f"{tmp_path}/{name} is not; set data.{field} to null" in str(error)
    assert error.field == f"data.{field}"


@pytest.mark.parametrize("option", [{"delimiter": ";"}, {"field": "data"}])
def test_an_option_for_another_source_is_refused(option: dict[str, str]) -> None:
    (field,) = option
    with pytest.raises(ValueError, match=rf"data.{field} is for data.source files, not builtin"):
        DataConfig.model_validate({"source": "builtin"} | option)
    with pytest.raises(ValueError, match=rf"data.{field} is not for text, .* data.records"):
        DataConfig.model_validate({"source": "files", "path": "a", "records": "line"} | option)


def test_a_field_that_is_there_twice_is_not_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"data": [{"text": "one"}], "data": [{"text": "two"}]}')
    assert "the key data is there twice; mend the file" in str(error_of(data(tmp_path / "a.json", field="data")))
    (tmp_path / "a.json").write_text('{"a.b": [{"text": "one"}], "a": {"b": [{"text": "two"}]}}')
    assert "data.field a.b stands for two values in" in str(error_of(data(tmp_path / "a.json", field="a.b")))


def test_a_damaged_file_gives_its_own_error_and_no_advice(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"body": f"{i} {random.Random(i).random()}"}) + "\n" for i in range(60_000))
    packed = gzip.compress(lines.encode())
    (tmp_path / "a.json.gz").write_bytes(packed[: len(packed) * 9 // 10])
    assert "data.text text is not in" in str(error_of(data(tmp_path / "a.json.gz")))

"""Text of other encodings than UTF-8 is read as what it is, or refused with the place."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from clm_dist.config.data import DataConfig
from clm_dist.errors import ConfigError, DataError
from clm_dist.prepare.data_file import DataFile
from tests.support.reading import LARGE, load_records

ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "shift_jis", "gb18030", "utf-8-sig")
SIZES = (1, 7, 100, LARGE)


def data(path: Path | str, encoding: str, **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "files", "path": str(path), "encoding": encoding} | settings)


def texts(config: DataConfig, size: int = LARGE) -> list[str]:
    return [record["text"] for record in load_records(config, size).to_pylist()]


def error_of(config: DataConfig, size: int = LARGE) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_records(config, size)
    return caught.value


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_kind_of_text_is_read_in_its_encoding(tmp_path: Path, encoding: str, size: int) -> None:
    word = {"latin-1": "caf\u00e9", "cp1252": "\u20ac", "shift_jis": "\u3042"}.get(encoding, "\u00e9\u20ac\U0001f600")
    expected = [f"{word} {i}" for i in range(20)]
    contents = {
        "a.txt": "\r\n".join(expected),
        "a.jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in expected),
        "a.json": json.dumps([{"text": text} for text in expected], ensure_ascii=False),
        "a.csv": "id,text\n" + "".join(f'1,"{text}"\n' for text in expected),
        "a.tsv": "id\ttext\n" + "".join(f"1\t{text}\n" for text in expected),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode(encoding))
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode(encoding)))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert texts(data(path, encoding), size) == expected, path
    book = "\r\n\r\n".join(expected)
    (tmp_path / "book").write_bytes(book.encode(encoding))
    assert texts(data(tmp_path / "book", encoding, records="file"), size) == [book]
    assert texts(data(tmp_path / "book", encoding, records="paragraph"), size) == expected


@pytest.mark.parametrize(
    ("encoding", "content", "problem"),
    [
        (
            "cp1252",
            b"a" * 1_000_000 + b"\x81b",
            "byte 1,000,000 (0x81) does not decode as cp1252; set data.encoding to ",
        ),
        ("ascii", b"ok\ncaf\xe9\n", "byte 6 (0xe9) does not decode as ascii"),
        ("utf-16", "ab".encode("utf-16") + b"\x00\xd8\x41\x00", "byte 6 (0x00) does not decode as utf-16"),
        ("utf-16", "ab".encode("utf-16") + b"x", "byte 6 (0x78) does not decode as utf-16"),
        ("shift_jis", b"abc\x82\xa0\x82\xff", "byte 5 (0x82) does not decode as shift_jis"),
        (
            "utf-16",
            "ab".encode("utf-16-be"),
            "has no byte order mark, which utf-16 needs; set data.encoding to",
        ),
        ("utf-32", "ab".encode("utf-32-le"), "has no byte order mark, which utf-32 needs"),
        ("latin-1", "ab".encode("utf-16"), "begins with the byte order mark of utf-16, but data.encoding is iso8859-1"),
        ("utf-16-be", b"\xff\xfea\0", "begins with the byte order mark of utf-16, but data.encoding is utf-16-be"),
        (
            "latin-1",
            b"\xef\xbb\xbfab",
            "begins with the byte order mark of utf-8, but data.encoding is iso8859-1; set",
        ),
        ("latin-1", "ab".encode("utf-16-le"), "holds NUL bytes as iso8859-1, so it is not text of this encoding"),
        ("utf-7", b"a +2AA-", "holds half of a character in utf-7"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.txt.gz", "a.py"])
def test_what_does_not_decode_is_named_with_its_place(
    tmp_path: Path, name: str, encoding: str, content: bytes, problem: str
) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    error = error_of(data(path, encoding, records="file" if name == "a.py" else None))
    assert str(error).startswith(f"{path}: {problem}")
    assert (type(error), error.field) == (DataError, "data.encoding")


def test_a_stream_gives_just_what_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\u00e9\u20acx".encode("utf-16"))
    with DataFile(str(tmp_path / "a.txt"), 8, encoding="utf-16").stream() as stream:
        assert [stream.read(size) for size in (1, 2, 9, 1)] == [b"\xc3", b"\xa9\xe2", b"\x82\xacx", b""]


def test_files_that_have_an_encoding_of_their_own_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "b.txt").write_text("b")
    error = error_of(data(tmp_path, "latin-1"))
    assert "data.encoding 'latin-1' is for text, and " in str(error)
    assert error.field == "data.encoding"


@pytest.mark.parametrize(
    "name", ["nonsense", "hex", "rot13", "idna", "punycode", "unicode_escape", "undefined", "", "a\0"]
)
def test_what_is_not_an_encoding_of_text_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"data.encoding .* is not an encoding of text that Python knows; name one"):
        data("a.txt", name)


@pytest.mark.parametrize("source", [{"source": "hub", "dataset": "a/b"}, {"source": "builtin"}])
def test_an_encoding_is_for_files(source: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"data.encoding is for data.source files, not \w+; set it to null"):
        DataConfig.model_validate(source | {"encoding": "latin-1"})


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "utf-16-be", "utf-16", "gb18030"])
def test_utf8_is_not_read_as_another_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("cafe and naïve\n" * 99_999, encoding="utf-8")
    assert "is UTF-8, and would be other text as" in str(error_of(data(tmp_path / "a.txt", encoding)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_ascii_is_not_read_as_a_wide_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"plain text, of even length\n\n")
    assert "is UTF-8, and would be other text as" in str(error_of(data(tmp_path / "a.txt", encoding)))


def test_the_mark_of_utf32_is_not_that_of_utf16(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-32"))
    with pytest.raises(ConfigError, match=r"UTF-32, not UTF-8; set data.encoding to utf-32"):
        load_records(DataConfig(source="files", path=str(tmp_path / "a.txt")), LARGE)
    assert "set it to utf-32" in str(error_of(data(tmp_path / "a.txt", "utf-16")))

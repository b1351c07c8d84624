"""A record for each line, paragraph or file of text, whatever the suffixes, and the same records however it is cut."""

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clm_dist.config.data import DataConfig
from clm_dist.errors import ConfigError, DataError
from clm_dist.files.blocks import Manifest
from clm_dist.prepare import cuts
from clm_dist.prepare.encode import Effort
from clm_dist.prepare.files import find_files
from clm_dist.prepare.sources import open_source
from clm_dist.progress import Silent
from tests.conftest import MakeJob
from tests.support.reading import LARGE, load_records
from tests.support.stores import prepare

SIZES = (1, 2, 3, 5, 7, 16, 64, 1000, LARGE)


def data(path: Path | str | list[str], records: str, **settings: Any) -> DataConfig:
    given = path if isinstance(path, list) else str(path)
    return DataConfig.model_validate({"source": "files", "path": given, "records": records} | settings)


def texts(path: Path | str | list[str], records: str, size: int = LARGE) -> list[str]:
    return [record["text"] for record in load_records(data(path, records), size).to_pylist()]


def by_hand(text: str) -> list[str]:
    """The paragraphs of a text."""
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            paragraphs[-1].append(line.rstrip("\r"))
        else:
            paragraphs.append([])
    return ["\n".join(lines) for lines in paragraphs if lines]


BOOK = (
    "\n\n  One.\nTwo, \u00e9\n \t\u3000\n\nThree.\r\nFour.\r\n\r\nFive.\n\f\nSix.\n\u2003\nSeven"
    + "!" * 90
    + "\n\x85\n \n"
)


@pytest.mark.parametrize("size", SIZES)
def test_paragraphs_do_not_depend_on_how_a_file_is_cut(tmp_path: Path, size: int) -> None:
    for name, text in {"a": BOOK, "b": BOOK * 3 + "end", "c": "\n" * 40, "d": "word " * 30, "e": "", "f": " "}.items():
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
        assert texts(tmp_path / f"{name}.txt", "paragraph", size) == by_hand(text), name
        assert texts(tmp_path / f"{name}.txt.gz", "paragraph", size) == by_hand(text), name
    assert by_hand(BOOK)[:3] == ["  One.\nTwo, \u00e9", "Three.\nFour.", "Five."]


def test_paragraphs_of_random_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blank lines lie across the pieces in which a file is read, too.
    monkeypatch.setattr(cuts, "_READ_AHEAD", 4)
    generator = np.random.default_rng(0)
    for _ in range(60):
        text = "".join(generator.choice(["a", "bc", "\n", "\n", " ", "\r\n", "\u3000"], size=40))
        (tmp_path / "a.txt").write_bytes(text.encode())
        for size in (1, 3, 10, 50):
            assert texts(tmp_path / "a.txt", "paragraph", size) == by_hand(text), (text, size)


def test_a_blank_line_has_what_python_takes_for_white_space() -> None:
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and chr(i) != "\n"]
    space = re.compile(cuts._SPACE)
    assert [c for c in characters if space.fullmatch(c.encode())] == [c for c in characters if c.isspace()]


def test_a_partition_without_a_paragraph_does_not_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 1_000_000)
    source = open_source(data(tmp_path / "a.txt", "paragraph"))
    assert len(list(source.partitions(1000))) == 1000
    assert texts(tmp_path / "a.txt", "paragraph", 1000) == ["x" * 1_000_000]


@pytest.mark.parametrize("size", SIZES)
def test_a_file_is_one_record_with_its_line_breaks(tmp_path: Path, size: int) -> None:
    contents = [BOOK, "def f():\r\n\treturn 1\r\n", "", "no end", "\ufeffmarked\n\ufeffkept\n"]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.py").write_bytes(content.encode())
    (tmp_path / "9.py.gz").write_bytes(gzip.compress(b"zipped\n\n"))
    assert texts(f"{tmp_path}/*.py*", "file", size) == [*contents[:4], "marked\n\ufeffkept\n", "zipped\n\n"]


def test_many_small_files_are_one_partition(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.py").write_bytes(b"print()\n" * 10)
    source = open_source(data(f"{tmp_path}/*.py", "file"))
    assert [len(partition.files) for partition in source.partitions(LARGE)] == [50]
    assert [len(partition.files) for partition in source.partitions(1600)] == [20, 20, 10]
    assert next(iter(source.partitions(1600))).where == f"{tmp_path}/00.py and 19 more"


def test_lines_are_read_of_files_of_any_suffix(tmp_path: Path) -> None:
    for name in ("a.log", "a", "a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(b'{"a": 1}\r\n\r\nb,c\n')
        for size in SIZES:
            assert texts(tmp_path / name, "line", size) == ['{"a": 1}', "", "b,c"], name


def test_a_directory_gives_its_text_alone(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.md", "c.py", "d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    assert texts(tmp_path, "file") == ["a.txt\n", "sub/b.md\n"]
    assert find_files(data(tmp_path, "file")).left_out == [
        f"{tmp_path}: 1 file *.jsonl, which is not read, 1 file *.py, which is not read"
    ]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("")
    error = error_of(data(tmp_path / "code", "file"))
    assert "no file of a known kind (.txt, .text, .md, and these with .gz" in str(error)
    assert str(error).endswith(f"name other files of text by a glob, such as {tmp_path}/code/**/*.py")
    assert texts(f"{tmp_path}/**/*.py", "file") == ["c.py\n", ""]


def error_of(config: DataConfig, size: int = LARGE) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_records(config, size)
    return caught.value


def test_an_unknown_suffix_may_be_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    error = error_of(DataConfig(source="files", path=str(tmp_path / "a.py")))
    assert str(error).endswith("if it is text, set data.records to file, paragraph or line")
    assert error.field == "data.path"


@pytest.mark.parametrize("records", ["line", "paragraph", "file"])
def test_what_is_not_text_is_refused(tmp_path: Path, records: str) -> None:
    for name in ("a.parquet", "a.arrow", "a.feather"):
        (tmp_path / name).write_bytes(b"PAR1")
        error = error_of(data(tmp_path / name, records))
        assert re.search(rf"data.records '{records}' is for text, and .*/{name} is not; set", str(error))
        assert error.field == "data.records"
    (tmp_path / "a.bin").write_bytes(b"text\n" * 2000 + b"\0\n")
    (tmp_path / "b.bin").write_bytes(b"text\n\n" * 2000 + b"\xff\n")
    for size in (100, LARGE):
        assert str(error_of(data(tmp_path / "a.bin", records), size)).startswith(f"{tmp_path}/a.bin: holds NUL bytes")
        error = error_of(data(tmp_path / "b.bin", records), size)
        assert str(error).startswith(f"{tmp_path}/b.bin:4001: not UTF-8")
        assert isinstance(error, DataError)


def test_a_record_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clm_dist.prepare.text._MAX_BYTES", 10)
    (tmp_path / "a.py").write_text("a = 1\nb = 2\n")
    for records in ("file", "paragraph"):
        assert "/a.py: a record of 1" in str(error_of(data(tmp_path / "a.py", records)))
    assert texts(tmp_path / "a.py", "line") == ["a = 1", "b = 2"]


def test_records_are_for_files() -> None:
    with pytest.raises(ValueError, match=r"data.records is for data.source files, not builtin; set it to null"):
        DataConfig(source="builtin", records="file")


@pytest.mark.parametrize("records", ["line", "paragraph", "file"])
def test_the_shards_do_not_depend_on_partitions(make_job: MakeJob, tmp_path: Path, records: str) -> None:
    paths = [tmp_path / "a.py", tmp_path / "b.py", tmp_path / "c.py"]
    for number, path in enumerate(paths):
        path.write_text("".join(f"def f{i}():\n    return {number * i}\n\n" for i in range(40)))
    settings = (f"data.path={tmp_path}/*.py", f"data.records={records}", "data.block_size=8")
    stores = [
        prepare(make_job(*settings, "data.eval_fraction=0.25"), tmp_path / str(size), Silent(), Effort(2, size))
        for size in (50, 1000, LARGE)
    ]
    manifests = [Manifest.read(store / "manifest.json") for store in stores]
    assert manifests[0].splits == manifests[1].splits == manifests[2].splits
    num_records = sum(split.num_records for split in manifests[0].splits.values())
    assert num_records == {"line": 360, "paragraph": 120, "file": 3}[records]

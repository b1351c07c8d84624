"""Which files of a directory are read, and that whatever is not is said."""

import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from clm_dist.config.data import DataConfig
from clm_dist.errors import ConfigError, DataError
from clm_dist.prepare.directory import choose, split_of
from clm_dist.prepare.files import find_files
from clm_dist.prepare.partitions import read_partition
from clm_dist.prepare.sources import open_source
from tests.support.reading import load_records

Put = Callable[[str, bytes | str], Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def put(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def rows(*numbers: int) -> str:
    return "".join(json.dumps({"text": f"t{number}"}) + "\n" for number in numbers)


def data(path: Path, split: str = "train") -> DataConfig:
    return DataConfig(source="files", path=str(path), split=split)


def texts(path: Path, split: str = "train", size: int = 1 << 20) -> list[str]:
    config = data(path, split)
    tables = [read_partition(partition, config) for partition in open_source(config).partitions(size)]
    return [text for table in tables for text in table.column("text").to_pylist()]


def parquet(*numbers: int) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({"text": [f"t{number}" for number in numbers]}), sink)
    return bytes(sink.getvalue())


def test_the_split_of_a_downloaded_data_set(put: Put, tmp_path: Path) -> None:
    put("README.md", "---\nlicense: mit\n---\n# A card\n")
    put(".gitattributes", "*.parquet filter=lfs\n")
    put("data/train-00000-of-00002.parquet", parquet(0, 1))
    put("data/train-00001-of-00002.parquet", parquet(2))
    put("data/test-00000-of-00001.parquet", parquet(3))
    put("data/unsupervised-00000-of-00001.parquet", parquet(4))
    assert texts(tmp_path) == ["t0", "t1", "t2"]
    assert texts(tmp_path, "test") == ["t3"]
    assert texts(tmp_path, "unsupervised[:1]") == ["t4"]
    assert find_files(data(tmp_path)).left_out == [
        f"{tmp_path}: 1 file README.md, the card of a data set, 1 file of the split test, 1 file of the split "
        "unsupervised"
    ]
    with pytest.raises(ConfigError, match="the files have the splits test, train, unsupervised; a part of one is wr"):
        texts(tmp_path, "validation")


def test_the_splits_are_those_of_datasets(put: Put, tmp_path: Path) -> None:
    by_name = ["train.jsonl", "my-test.jsonl", "sub/eval 2.jsonl", "b_training.jsonl", "dev.jsonl"]
    by_directory = ["train/a.jsonl", "my-test/b.jsonl", "eval 2/a.jsonl", "b_training/a.jsonl", "dev/a.jsonl"]
    for kind, names in (("name", by_name), ("directory", by_directory)):
        for number, name in enumerate(names):
            put(f"{kind}/{name}", rows(number))
        root = tmp_path / kind
        loaded = datasets.load_dataset("json", data_dir=str(root), cache_dir=str(tmp_path / "cache" / kind))
        found = {split: sorted(texts(root, split)) for split in loaded}
        assert found == {split: sorted(table["text"]) for split, table in loaded.items()}
        assert found == {"train": ["t0", "t3"], "test": ["t1", "t2"], "validation": ["t4"]}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("contest.jsonl", None),
        ("latest/a.jsonl", None),
        ("trains.jsonl", None),
        ("data-00000-of-00001.arrow", None),
        ("part-00000-of-00002.jsonl", None),
        ("data/part-00000-of-00002.jsonl", "part"),
        ("valid.jsonl.gz", "validation"),
        ("a.test.jsonl", "test"),
    ],
)
def test_a_word_inside_another_names_no_split(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_without_a_train_split_the_files_that_name_none_are_it(put: Put, tmp_path: Path) -> None:
    for number, name in enumerate(("a.jsonl", "b.jsonl", "test.jsonl")):
        put(name, rows(number))
    assert texts(tmp_path) == ["t0", "t1"]
    assert find_files(data(tmp_path)).left_out == [f"{tmp_path}: 1 file of the split test"]


def test_beside_a_train_split_the_files_that_name_none_are_left_out_and_said(put: Put, tmp_path: Path) -> None:
    put("train.jsonl", rows(0))
    put("extra.jsonl", rows(1))
    assert texts(tmp_path) == ["t0"]
    assert find_files(data(tmp_path)).left_out == [f"{tmp_path}: 1 file of no split"]


@pytest.mark.parametrize(
    "name",
    [
        *(".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", ".cache/huggingface/a.jsonl", "__MACOSX/a.jsonl"),
        *("sub/.hidden/a.jsonl", "__pycache__/a.jsonl", ".a.jsonl.swp"),
    ],
)
def test_hidden_files_and_those_of_tools_are_no_data(put: Put, tmp_path: Path, name: str) -> None:
    put("a.jsonl", rows(0, 1))
    put(name, rows(0, 1))
    assert texts(tmp_path) == ["t0", "t1"]
    assert find_files(data(tmp_path)).left_out == []


def test_a_directory_that_is_hidden_itself_is_read_if_it_is_named(put: Put, tmp_path: Path) -> None:
    put(".corpus/a.jsonl", rows(0))
    assert texts(tmp_path / ".corpus") == ["t0"]


def test_files_of_unknown_kinds_are_counted(put: Put, tmp_path: Path) -> None:
    put("a.jsonl", rows(0))
    for name in ("b.pdf", "c.pdf", "d.tar.gz", "Makefile"):
        put(name, "x")
    assert find_files(data(tmp_path)).left_out == [
        f"{tmp_path}: 2 files *.pdf, which is not read, 1 file *.tar.gz, which is not read, 1 file *Makefile, which is "
        "not read"
    ]


def test_a_directory_of_other_files_alone_says_which(put: Put, tmp_path: Path) -> None:
    put("src/a.py", "x = 1\n")
    with pytest.raises(
        DataError, match=r"no file of a known kind .*, only 1 file \*.py, which is not read; "
    ) as caught:
        find_files(data(tmp_path))
    advice = f"if that is text, name it by a glob, such as {tmp_path}/**/*.py, and set data.records to file"
    assert str(caught.value).endswith(advice)


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"text": ["t0", "t1"]})
    saved.save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "one") == ["t0", "t1"]
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "both") == ["t0", "t1"]
    assert texts(tmp_path / "both", "test") == ["t0"]
    # A file of that name elsewhere is data.
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "state.json").write_text(rows(5))
    assert texts(tmp_path / "own") == ["t5"]


def test_xz_is_read(put: Put, tmp_path: Path) -> None:
    put("a.jsonl", rows(0))
    put("b.jsonl.xz", lzma.compress(rows(1, 2).encode()))
    assert texts(tmp_path) == ["t0", "t1", "t2"]
    assert texts(tmp_path, size=8) == ["t0", "t1", "t2"]
    whole = lzma.compress(rows(*range(99)).encode())
    for damaged in (whole[:-20], whole[:60] + b"damage" + whole[66:]):
        with pytest.raises(DataError, match=r"c.jsonl.xz: cannot be read: .*; mend the file or take it out"):
            texts(put("c.jsonl.xz", damaged))


def test_gzip_with_zeros_at_its_end_and_of_several_members_is_read(put: Put) -> None:
    whole = gzip.compress(rows(0).encode()) + gzip.compress(rows(1).encode())
    assert texts(put("a.jsonl.gz", whole + bytes(512))) == ["t0", "t1"]
    with pytest.raises(DataError, match=r"b.jsonl.gz: cannot be read: "):
        texts(put("b.jsonl.gz", whole[:-9]))
    for damaged in (b"not compressed", whole[:14] + b"damage" + whole[20:]):
        with pytest.raises(DataError, match=r"c.jsonl.gz: cannot be read: "):
            texts(put("c.jsonl.gz", damaged))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_a_pointer_of_git_lfs_is_no_data(put: Put, name: str) -> None:
    path = put(name, f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    with pytest.raises(DataError, match="is a pointer of Git LFS, not the data; run `git lfs pull`"):
        find_files(data(path))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_said_and_never_read_as_something_else(put: Put, name: str, encoding: str) -> None:
    content = {"a.txt": "one\r\ntwo\r\n", "a.csv": "text,id\r\none,1\r\n", "a.jsonl": rows(0)}[name]
    path = put(name, content.encode(encoding))
    with pytest.raises(DataError, match=rf"a.\w+: .* UTF-?(16|8); set data.encoding to {encoding}, or ") as caught:
        texts(path)
    # What it says is right.
    assert re.search(r"(UTF-16, not UTF-8|holds NUL bytes, so it is not text, or is UTF-16);", str(caught.value))
    read = load_records(DataConfig(source="files", path=str(path), encoding=encoding)).column("text").to_pylist()
    assert read == {"a.txt": ["one", "two"], "a.csv": ["one"], "a.jsonl": ["t0"]}[name]


def test_nul_bytes_far_in_a_text_are_refused(put: Put) -> None:
    path = put("a.txt", b"line\n" * 5000 + b"b\0d\n")
    with pytest.raises(DataError, match=r"a.txt: holds NUL bytes"):
        texts(path)


@pytest.mark.parametrize("size", [1 << 20, 30])
def test_marks_inside_joined_files_are_no_text(put: Put, size: int) -> None:
    one = b"\xef\xbb\xbf" + rows(0, 1).encode()
    assert texts(put("a.jsonl", one + one), size=size) == ["t0", "t1"] * 2
    lines = b"\xef\xbb\xbfone\ntwo\n"
    assert texts(put("a.txt", lines * 2), size=size) == ["one", "two"] * 2


def test_a_list_of_files_has_the_split_train_alone(put: Put) -> None:
    path = put("test.jsonl", rows(0))
    assert texts(path) == ["t0"]
    with pytest.raises(ConfigError, match="the files have one split, train"):
        texts(path, "test")


def test_what_is_named_itself_is_said_where_another_split_is_taken(put: Put, tmp_path: Path) -> None:
    put("dir/test.jsonl", rows(0))
    extra = put("extra.jsonl", rows(1))
    both = DataConfig(source="files", path=[str(tmp_path / "dir"), str(extra)], split="test")
    found = find_files(both)
    assert [Path(file.name).name for file in found.files] == ["test.jsonl"]
    assert found.left_out == [f"{extra}: what is named itself is of the split train"]


def test_the_built_in_corpus_has_one_split() -> None:
    with pytest.raises(ConfigError, match=r"data.split test: the built-in corpus has one split, train"):
        open_source(DataConfig(source="builtin", split="test"))


def test_choosing_asks_no_disk() -> None:
    chosen = choose([("a/train.x", 1), ("a/b.x", 2), ("a/.c.x", 3)], "train", lambda number: True)
    assert (chosen.files, chosen.splits, chosen.left_out) == ([1], ["train"], "1 file of no split")

"""Files on S3 and behind https-like URLs, through fsspec, against servers on this machine."""

import functools
import gzip
import http.server
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from clm_dist.config.data import DataConfig
from clm_dist.errors import ConfigError, DataError, StorageError
from clm_dist.files.blocks import Manifest
from clm_dist.files.hashes import HashMemory
from clm_dist.prepare.encode import Effort
from clm_dist.prepare.identity import source_identity
from clm_dist.progress import Silent
from tests.conftest import MakeJob
from tests.support.reading import load_records
from tests.support.stores import find_store, prepare

RECORDS = [{"topic": f"t{i}", "text": f"text {i} of some words " * 3} for i in range(200)]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def files(path: str | list[str], **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "files", "path": path} | settings)


def test_files_on_s3_are_read_like_files_here(bucket: Any, tmp_path: Path) -> None:
    bucket.pipe("texts/a/1.jsonl", JSONL)
    bucket.pipe("texts/a/2.jsonl.gz", gzip.compress(JSONL))
    bucket.pipe("texts/a/sub/3.txt", b"one\ntwo\n")
    pa.parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "4.parquet", row_group_size=50)
    bucket.pipe("texts/a/4.parquet", (tmp_path / "4.parquet").read_bytes())
    expected = [record["text"] for record in RECORDS]
    for name in ("1.jsonl", "2.jsonl.gz", "4.parquet"):
        for size in (500, 1 << 20):
            read = load_records(files(f"s3://texts/a/{name}"), size)
            assert read.column("text").to_pylist() == expected, (name, size)
    everything = load_records(files("s3://texts/a")).column("text").to_pylist()
    assert everything == [*expected, *expected, *expected, "one", "two"]
    assert len(load_records(files("s3://texts/a/*.jsonl*"))) == 400
    assert len(load_records(files(["s3://texts/a/1.jsonl", "s3://texts/a/sub/3.txt"], split="train[:5]"))) == 5


def test_paragraphs_files_and_encodings_are_read_from_s3(bucket: Any) -> None:
    book = "\n\n".join(f"caf\u00e9 {i}\nline" for i in range(50))
    bucket.pipe("texts/b/a.py", book.encode())
    bucket.pipe("texts/b/b.py", book.encode("utf-16"))
    for size in (100, 1 << 20):
        for name, encoding in (("a.py", None), ("b.py", "utf-16")):
            for records, expected in (("paragraph", book.split("\n\n")), ("file", [book])):
                data = files(f"s3://texts/b/{name}", records=records, encoding=encoding)
                assert load_records(data, size).column("text").to_pylist() == expected, (size, name, records)


def test_a_store_from_s3_is_that_of_the_same_file_and_changes_with_it(
    bucket: Any, make_job: MakeJob, tmp_path: Path
) -> None:
    bucket.pipe("texts/a.jsonl", JSONL)
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    here = Manifest.read(prepare(make_job(f"data.path={tmp_path / 'a.jsonl'}"), tmp_path, Silent()) / "manifest.json")
    job = make_job("data.path=s3://texts/a.jsonl")
    store = prepare(job, tmp_path, Silent(), Effort(2, 1000))
    there = Manifest.read(store / "manifest.json")
    assert there.splits == here.splits
    assert find_store(job, tmp_path) == store
    bucket.pipe("texts/a.jsonl", JSONL.replace(b"words", b"wordS"))
    assert find_store(job, tmp_path) is None
    assert source_identity(job.data, HashMemory(tmp_path / "digests.json")) != there.source["source"]


def test_what_is_wrong_on_s3_is_said(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def error_of(path: str) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            load_records(files(path), 500)
        assert caught.value.field == "data.path"
        return caught.value

    assert "data.path s3://texts/none/*.jsonl matches no file; check the bucket" in str(
        error_of("s3://texts/none/*.jsonl")
    )
    assert "matches no file" in str(error_of("s3://texts/a.jsonl"))
    bucket.pipe("texts/half.jsonl.gz", gzip.compress(JSONL)[:100])
    # The connection may have ended early.
    with pytest.raises(StorageError, match=r"^s3://texts/half.jsonl.gz: cannot be read: .*; run the same"):
        load_records(files("s3://texts/half.jsonl.gz"), 500)
    bucket.pipe("texts/broken.jsonl", JSONL + b"nonsense\n")
    assert str(error_of("s3://texts/broken.jsonl")).startswith("s3://texts/broken.jsonl:201: not a JSON record")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    type(bucket).clear_instance_cache()
    with pytest.raises(StorageError, match="check the address and your network, or run the same command again later"):
        load_records(files("s3://texts/a.jsonl"), 500)


def test_a_storage_whose_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def no_package(url: str) -> None:
        raise ImportError(f"Please install gcsfs to access Google Storage: {url}")

    monkeypatch.setattr(fsspec, "url_to_fs", no_package)
    with pytest.raises(ConfigError, match=r"Please install gcsfs .*; pip install 'clm-dist\[gs\]'"):
        load_records(files("gs://bucket/a.jsonl"))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"data.path nonsense://x: Protocol not known"):
        load_records(files("nonsense://x"))


def test_files_behind_a_web_address(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(JSONL))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        for name in ("a.jsonl", "b.jsonl.gz", "a.jsonl?download=true"):
            read = load_records(files(f"{address}/{name}"), 1 << 20)
            assert read.column("text").to_pylist() == [record["text"] for record in RECORDS], name
        with pytest.raises(ConfigError, match="check the address"):
            load_records(files(f"{address}/c.jsonl"))
        assert source_identity(files(f"{address}/a.jsonl"), HashMemory(tmp_path / "digests.json"))
    finally:
        server.shutdown()
        server.server_close()
    assert DataError.exit_code == 2

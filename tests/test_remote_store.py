"""Stores that are kept on S3: put there once, fetched once by every machine, checked."""

from pathlib import Path
from typing import Any

import pytest

from clm_dist.errors import ConfigError, DataError
from clm_dist.files.blocks import Blocks, Manifest
from clm_dist.files.stores import Store, Stores
from clm_dist.prepare import pipeline
from clm_dist.progress import Silent
from tests.conftest import MakeJob, WriteJob
from tests.support.command import clm_dist
from tests.support.stores import find_store, prepare

URL = "s3://texts/stores"


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_a_store_is_prepared_once_for_all_machines(
    bucket: Any, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    first = prepare(job, tmp_path / "one", Silent(), url=URL)
    names = [name.removeprefix(f"texts/stores/{first.name}/") for name in bucket.find("texts/stores")]
    assert sorted(names) == sorted(files_of(first))
    # Another machine has an empty cache and reads no text.
    monkeypatch.setattr(pipeline, "open_sources", None)
    second = prepare(job, tmp_path / "two", Silent(), url=URL)
    assert files_of(second) == files_of(first)
    assert find_store(job, tmp_path / "three", URL) == tmp_path / "three" / first.name
    assert len(Blocks(tmp_path / "three" / first.name, "train")) == len(Blocks(first, "train"))
    assert find_store(make_job("data.block_size=16"), tmp_path / "three", URL) is None


def test_a_file_that_is_here_is_not_fetched_again(bucket: Any, make_job: MakeJob, tmp_path: Path) -> None:
    store = prepare(make_job(), tmp_path / "one", Silent(), url=URL)
    here = tmp_path / "two" / store.name
    assert Store(here, f"{URL}/{store.name}").fetch()
    (here / "manifest.json").unlink()
    bucket.rm(f"texts/stores/{store.name}/train/00000.arrow")
    assert Store(here, f"{URL}/{store.name}").fetch()
    assert files_of(here) == files_of(store)


def test_a_shard_that_is_damaged_there_is_named(bucket: Any, make_job: MakeJob, tmp_path: Path) -> None:
    store = prepare(make_job(), tmp_path / "one", Silent(), url=URL)
    shard = f"texts/stores/{store.name}/train/00000.arrow"
    bucket.pipe(shard, bucket.cat(shard)[:-1] + b"x")
    with pytest.raises(DataError, match=r"train/00000.arrow is not as its manifest says; remove s3://.* again"):
        Store(tmp_path / "two" / store.name, f"{URL}/{store.name}").fetch()
    assert not (tmp_path / "two" / store.name / "manifest.json").exists()


def test_a_store_that_was_not_put_there_whole_is_not_taken(bucket: Any, make_job: MakeJob, tmp_path: Path) -> None:
    store = prepare(make_job(), tmp_path / "one", Silent())
    bucket.pipe(f"texts/stores/{store.name}/train/00000.arrow", b"half")
    assert not Store(tmp_path / "two" / store.name, f"{URL}/{store.name}").fetch()
    Store(store, f"{URL}/{store.name}").upload()
    assert Store(tmp_path / "two" / store.name, f"{URL}/{store.name}").fetch()


def test_the_commands_take_a_url(
    bucket: Any,
    write_job: WriteJob,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clm_dist.cli.options.DEFAULT_STORES", str(tmp_path / "cache"))
    said = clm_dist(capsys, monkeypatch, "prepare", write_job(), "--store", URL)
    assert said.code == 0, said.err
    store = Path(said.out.strip())
    assert store.is_relative_to(tmp_path / "cache" / "remote")
    assert Manifest.read(store / "manifest.json").splits["train"].num_blocks > 0
    assert bucket.exists(f"texts/stores/{store.name}/manifest.json")
    assert Stores.at(URL, str(tmp_path / "cache")) == Stores(store.parent, URL)
    assert Stores.at(str(tmp_path), "cache") == Stores(tmp_path)


def test_a_url_that_cannot_be_reached(make_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--store nonsense://x/[0-9a-f]{16}: Protocol not known"):
        prepare(make_job(), tmp_path, Silent(), url="nonsense://x")


@pytest.mark.slow
def test_a_node_without_the_store_fetches_it_before_training(make_job: MakeJob, tmp_path: Path, cluster: Any) -> None:
    """As on a second node: the workers are told of a path where nothing is.

    The URL is a directory's, since this Ray was started before there was an S3 server to know of.
    """
    from clm_dist.files.run_dir import RunDir
    from clm_dist.train.ray import driver
    from clm_dist.train.ray.trainer import build_trainer

    job = make_job("train.max_steps=2", "checkpoint.every=2")
    url = f"file://{tmp_path}/kept"
    store = prepare(job, tmp_path / "one", Silent(), url=url)
    elsewhere = Store(tmp_path / "node" / store.name, f"{url}/{store.name}")
    build = build_trainer

    def on_another_node(job: Any, run: Any, _: Store, *rest: Any) -> Any:
        return build(job, run, elsewhere, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "build_trainer", on_another_node)
        result = driver.train(job, RunDir(tmp_path / "runs" / "tiny"), Store(store, elsewhere.url), cluster, Silent())
    assert result["status"] == "done"
    assert files_of(elsewhere.local) == files_of(store)


def test_a_store_that_every_node_sees_is_neither_locked_nor_written_by_workers(
    make_job: MakeJob, tmp_path: Path
) -> None:
    store = Store(prepare(make_job(), tmp_path / "one", Silent()))
    before = {path.name for path in store.local.parent.iterdir()}
    with store.lease().hold(timeout_s=0):
        # A worker does not wait for whoever holds it.
        assert store.fetch()
    assert not Store(tmp_path / "two" / "0123456789abcdef").fetch()
    assert {path.name for path in store.local.parent.iterdir()} == before
    assert not (tmp_path / "two").exists()

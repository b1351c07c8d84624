"""Data sets of the Hub: known by their commit, or by their files where they lie in a directory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clm_dist.config.data import DataConfig
from clm_dist.errors import ConfigError
from clm_dist.files.blocks import Manifest
from clm_dist.files.hashes import HashMemory
from clm_dist.prepare.identity import pinned, source_identity
from clm_dist.progress import Silent
from tests.conftest import MakeJob
from tests.support.fake_hub import FakeHub
from tests.support.reading import load_records
from tests.support.stores import prepare


def hub(dataset: Path | str, **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "hub", "dataset": str(dataset)} | settings)


@pytest.fixture
def upload(fake_hub: FakeHub) -> Callable[[str], str]:
    """Puts a text into the data set alice/texts of the Hub; gives the commit."""
    from huggingface_hub import HfApi

    HfApi().create_repo("alice/texts", repo_type="dataset")

    def put(text: str) -> str:
        commit = HfApi().upload_file(
            path_or_fileobj=text.encode(), path_in_repo="train.txt", repo_id="alice/texts", repo_type="dataset"
        )
        return commit.oid

    return put


def test_a_data_set_is_the_commit_that_it_has_now(
    upload: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, digests = hub("alice/texts"), HashMemory(tmp_path / "digests.json")
    first = upload("one")
    old = pinned(data)
    assert (old.revision, source_identity(old, digests)["revision"]) == (first, first)
    second = upload("two")
    assert pinned(data).revision == second
    assert pinned(hub("alice/texts", revision=first)) == old
    # With no network it is the commit that was seen last.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pinned(data).revision == second
    assert pinned(hub("alice/texts", revision=first)) == old
    assert pinned(hub("alice/texts", revision="other")).revision == "other"
    assert pinned(hub("nobody/nothing")).revision is None


def test_another_commit_than_the_job_s_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes the one that it read last where the Hub is not reachable."""
    from datasets import Dataset

    wanted, cached = "a" * 40, tmp_path / ("b" * 40) / "texts-train.arrow"
    cached.parent.mkdir()
    table = pa.table({"text": ["one"]})
    with pa.OSFile(str(cached), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_file(str(cached)))
    assert load_records(hub("alice/texts", revision="b" * 40)).to_pylist() == [{"text": "one"}]
    with pytest.raises(ConfigError, match=f"gives commit {'b' * 40}, not {wanted} as the job needs") as caught:
        load_records(hub("alice/texts", revision=wanted))
    assert caught.value.field == "data.dataset"


def test_a_directory_is_what_its_files_hold(
    make_job: MakeJob, tmp_path: Path, stores: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    job = make_job("data.source=hub", "data.dataset=texts")

    def prepared_in(project: str) -> Path:
        monkeypatch.chdir(tmp_path / project)
        return prepare(job, stores, Silent())

    for project in ("a", "b"):
        (tmp_path / project / "texts").mkdir(parents=True)
        shutil.copyfile(corpus, tmp_path / project / "texts" / "train.jsonl")
    first = prepared_in("a")
    (tmp_path / "a" / "texts" / ".hidden").write_text("")
    assert prepared_in("a") == prepared_in("b") == first
    records = corpus.read_text().splitlines()[:30]
    (tmp_path / "b" / "texts" / "train.jsonl").write_text("\n".join(records))
    second = prepared_in("b")
    assert second != first
    assert Manifest.read(second / "manifest.json").splits["train"].num_records == 24
    # A file's name says which split it is.
    (tmp_path / "b" / "texts" / "train.jsonl").rename(tmp_path / "b" / "texts" / "test.jsonl")
    with pytest.raises(ConfigError, match=r'data.dataset texts: Unknown split "train"'):
        prepared_in("b")


def test_wrong_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "texts"
    directory.mkdir()
    with pytest.raises(ConfigError, match=f"data.dataset {directory}: "):
        load_records(hub(directory))
    (directory / "train.jsonl").write_text(json.dumps({"text": "a"}))
    with pytest.raises(ConfigError, match=r"\"train\[:0\]\" corresponds to no data!; check data.config, data.split"):
        load_records(hub(directory, split="train[:0]"))
    (directory / "train.jsonl").write_text("nonsense")
    with pytest.raises(ConfigError, match=f"data.dataset {directory}: .*the data set's files"):
        load_records(hub(directory))
    with pytest.raises(ConfigError, match="not reachable on the Hub: "):
        load_records(pinned(hub("a" * 5000)))

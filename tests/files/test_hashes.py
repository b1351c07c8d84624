"""Files that are as they were are not read again, and nothing else is taken for them."""

import os
from pathlib import Path
from typing import Any

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.files.hashes import HashMemory
from clm_dist.files.stores import Stores
from clm_dist.prepare.pipeline import prepare
from clm_dist.progress import Silent
from tests.conftest import MakeJob


def test_a_hash_is_remembered_for_the_file_as_it_is(tmp_path: Path) -> None:
    file, memory = tmp_path / "a", tmp_path / "hashes.json"
    file.write_text("one")
    assert HashMemory(memory).get(file) is None
    HashMemory(memory).remember({file: "abc"})
    assert HashMemory(memory).get(file) == "abc"
    os.utime(file, ns=(1, 1))
    assert HashMemory(memory).get(file) is None


def test_a_second_preparation_reads_neither_its_sources_nor_its_store(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job: JobConfig = make_job()
    store = prepare(job, Stores(tmp_path), Silent())

    def fail(*_: Any) -> Any:
        raise AssertionError("a file that is as it was is read again")

    monkeypatch.setattr("clm_dist.prepare.identity._digest", fail)
    monkeypatch.setattr("clm_dist.files.hashes.file_sha256", fail)
    assert prepare(job, Stores(tmp_path), Silent()) == store

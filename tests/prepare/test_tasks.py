"""Where the work over partitions runs."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clm_dist.errors import DataError, NotReadyError
from clm_dist.files.blocks import Manifest
from clm_dist.prepare import pools as tasks
from clm_dist.prepare.encode import Effort
from clm_dist.progress import Silent
from clm_dist.train.ray.cluster import Cluster
from tests.conftest import MakeJob
from tests.support.stores import prepare


def test_results_come_in_order_and_few_are_in_flight() -> None:
    running, most, lock = 0, 0, threading.Lock()
    begun = []

    def slow(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02 if number % 3 else 0.05)
        with lock:
            running -= 1
        return number * number

    def begin(number: int) -> Callable[[], int]:
        begun.append(number)
        return pool.submit(slow, number)

    with tasks.open_pool(3, is_small=True) as pool:
        for number, result in tasks.in_order(pool, range(20), begin):
            assert result == number * number
            assert len(begun) <= number + 3 + 2
    assert begun == list(range(20))
    assert most == 3


def test_what_a_task_raises_is_raised_here(cluster: Cluster) -> None:
    for is_small in (True, False):
        with tasks.open_pool(2, is_small=is_small) as pool:
            assert isinstance(pool, tasks.Threads if is_small else tasks.RayTasks)
            with pytest.raises(DataError, match="broken: here") as caught:
                pool.submit(_raises)()
            assert caught.value.field == "data.path"


def test_a_task_that_ray_has_lost_is_a_reason_to_try_again(cluster: Cluster) -> None:
    with (
        tasks.open_pool(2, is_small=False) as pool,
        pytest.raises(NotReadyError, match=r"Ray has lost a task of the preparation \(.*; the same command goes on"),
    ):
        pool.submit(os._exit, 1)()


def _raises() -> None:
    raise DataError("broken: here", field="data.path")


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
def test_ray_tasks_make_the_shards_of_threads(
    make_job: MakeJob, tmp_path: Path, cluster: Cluster, corpus: Path, num_tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "RayTasks", None)
        threads = prepare(job, tmp_path / "threads", Silent(), Effort(num_tasks, 1 << 20))
    (tmp_path / "zipped").mkdir()
    for number, (path, size) in enumerate([(corpus, 500), (_zipped(corpus, tmp_path), 500)]):
        store = prepare(make_job(f"data.path={path}"), tmp_path / str(number), Silent(), Effort(num_tasks, size))
        found, expected = (Manifest.read(each / "manifest.json") for each in (store, threads))
        assert found.splits == expected.splits
        assert found.engine == expected.engine == "gigatoken"


def _zipped(corpus: Path, directory: Path) -> Path:
    """The same records as CSV, which the driver reads and the tasks are given."""
    import json

    import pyarrow as pa
    import pyarrow.csv

    path = directory / "corpus.csv"
    pa.csv.write_csv(pa.Table.from_pylist([json.loads(line) for line in corpus.read_text().splitlines()]), path)
    return path


def test_a_broken_record_in_a_ray_task_is_named(make_job: MakeJob, tmp_path: Path, cluster: Cluster) -> None:
    lines = ['{"text": "a text of some words"}'] * 200
    lines[150] = '{"text": 5}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    job = make_job(f"data.path={tmp_path / 'a.jsonl'}", "tokenizer.train=null", f"tokenizer.path={tmp_path / 'words'}")
    _write_tokenizer(tmp_path / "words")
    with pytest.raises(DataError, match=r"a.jsonl:151: text is a number, but text in line \d+; give it one type"):
        prepare(job, tmp_path, Silent(), Effort(2, 500))
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "words"]


def _write_tokenizer(directory: Path) -> None:
    from clm_dist.config.data import TokenizerTraining
    from clm_dist.prepare.tokenizer_training import train_tokenizer

    train_tokenizer(["a text of some words"], TokenizerTraining(vocab_size=300), directory)

"""Preparations that are killed with SIGKILL at random moments, and two that run at once."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from clm_dist.files.blocks import Manifest
from tests.conftest import tiny_job

NUM_PARTITIONS = 60


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 records of words that no tokenizer has seen: enough for seconds of work."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    with path.open("w") as file:
        for i in range(20_000):
            words = ["".join(generator.choice(letters, 12)) for _ in range(20)]
            file.write(json.dumps({"topic": f"t{i}", "text": " ".join(words)}) + "\n")
    return path


class Preparation:
    """`clm-dist prepare` of the same job in a process of its own, into a store."""

    def __init__(self, directory: Path, records: Path, *, environment: dict[str, str] | None = None) -> None:
        self.stores = directory / "stores"
        self.environment = os.environ | (environment or {})
        job = tiny_job(records)
        job["tokenizer"]["engine"] = "tokenizers"  # the slower one leaves more moments to be killed in
        (directory / "job.yaml").write_text(yaml.safe_dump(job))
        size = (records.stat().st_size + NUM_PARTITIONS) / 2**20 / NUM_PARTITIONS
        self.command = [sys.executable, "-m", "clm_dist", "prepare", str(directory / "job.yaml"), "--tasks", "2"]
        self.command += ["--partition-mib", f"{size:.6f}", "--store", str(self.stores)]

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )

    def finish(self) -> tuple[str, float]:
        """Run to the end; gives what it said and how long it took."""
        began = time.monotonic()
        process = self.start()
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return said, time.monotonic() - began

    def files(self) -> dict[str, bytes]:
        """Every file of the finished store."""
        (manifest,) = self.stores.glob("*/manifest.json")
        Manifest.read(manifest)
        store = manifest.parent
        return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def partitions_in(said: str) -> list[int]:
    return [int(number) for number in re.findall(r" partition (\d+): ", said)]


def kill_and_go_on(
    directory: Path, records: Path, moments: list[float], **settings: Any
) -> Iterator[tuple[dict[str, bytes], int]]:
    """The stores of preparations that are killed after so many seconds and then run again.

    With each comes how many of its partitions the killed process had done.
    """
    for number, moment in enumerate(moments):
        (directory / str(number)).mkdir()
        preparation = Preparation(directory / str(number), records, **settings)
        process = preparation.start()
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        again, _ = preparation.finish()
        done, made = set(partitions_in(said)), set(partitions_in(again))
        # What was done is not done again; the last part may have been written and not said.
        assert not done & made
        assert len(set(range(NUM_PARTITIONS)) - done - made) <= 1
        yield preparation.files(), len(done)


def moments_of(num_kills: int, seconds: float, seed: int) -> list[float]:
    """Random moments, most of them in the half in which partitions are done: before that Python imports."""
    generator = random.Random(seed)
    return [seconds * generator.uniform(0.1 if kill % 5 == 0 else 0.5, 1) for kill in range(num_kills)]


@pytest.mark.parametrize(
    "num_kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)]
)
def test_kills_at_random_moments_leave_the_same_store(tmp_path: Path, records: Path, num_kills: int) -> None:
    (tmp_path / "whole").mkdir()
    whole = Preparation(tmp_path / "whole", records)
    said, seconds = whole.finish()
    assert partitions_in(said) == list(range(NUM_PARTITIONS))
    in_between = 0
    for store, num_done in kill_and_go_on(tmp_path, records, moments_of(num_kills, seconds, seed=num_kills)):
        assert store == whole.files()
        in_between += 0 < num_done < NUM_PARTITIONS
    assert in_between or num_kills < 20


@pytest.mark.long
def test_a_killed_driver_of_ray_tasks_goes_on(tmp_path: Path, records: Path, cluster: Any) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    (tmp_path / "whole").mkdir()
    whole = Preparation(tmp_path / "whole", records)
    whole.finish()
    (tmp_path / "ray").mkdir()
    seconds = Preparation(tmp_path / "ray", records, environment={"RAY_ADDRESS": address}).finish()[1]
    moments = moments_of(3, seconds, seed=1)
    for store, _ in kill_and_go_on(tmp_path, records, moments, environment={"RAY_ADDRESS": address}):
        assert store == whole.files()


@pytest.mark.slow
def test_two_preparations_of_the_same_job_at_once_make_one_store(tmp_path: Path, records: Path) -> None:
    preparation = Preparation(tmp_path, records)
    both = [preparation.start(), preparation.start()]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    made = sorted(len(partitions_in(err)) for _, err in said)
    assert made[0] == 0
    assert made[1] == NUM_PARTITIONS
    assert sum("Waiting for another process that prepares the same blocks" in err for _, err in said) == 1
    preparation.files()

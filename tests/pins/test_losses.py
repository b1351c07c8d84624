"""A small run computes what it did; `python -m tests.pins losses` writes the golden values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pins.golden import read_golden
from tests.pins.losses import STEPS, WITH_DROPOUT, small_job, small_store, steps_of, train_strategies
from tests.support.training import STRATEGIES, train_several
from tests.support.workers import run_workers

QUICK = ("ddp", "fsdp2")
# Measured: 1e-8 between the newest instructions of a CPU and none of them (ATEN_CPU_CAPABILITY=default).
_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train_strategies(tmp_path_factory.mktemp("quick"), *QUICK)


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train_strategies(tmp_path_factory.mktemp("slow"), *(name for name in STRATEGIES if name not in QUICK))


def check(run: Path) -> None:
    golden: dict[str, list[Any]] = read_golden("losses")
    steps = steps_of(run)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for name in ("blocks", "tokens"):
        assert [record[name] for record in steps] == golden[name]
    for name in ("loss", "lr"):
        np.testing.assert_allclose([record[name] for record in steps], golden[name], rtol=_TOLERANCE)


@pytest.mark.parametrize("strategy", QUICK)
def test_losses_and_blocks_are_those_of_the_golden_file(strategy: str, quick_runs: dict[str, Path]) -> None:
    check(quick_runs[strategy])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in QUICK])
def test_losses_and_blocks_of_the_other_strategies_are_those_of_the_golden_file(
    strategy: str, slow_runs: dict[str, Path]
) -> None:
    check(slow_runs[strategy])


def test_dropout_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for run, workers in ((one, 1), (two, 2)):
        jobs = [small_job(tmp_path, *WITH_DROPOUT, f"cluster.workers={workers}", "train.max_steps=6")]
        run_workers(train_several, workers, jobs, [run], small_store(tmp_path))
    losses, others = ([record["loss"] for record in steps_of(run)] for run in (one, two))
    assert len(losses) == 6
    np.testing.assert_allclose(losses, others, rtol=_TOLERANCE)
    assert max(abs(a / b - 1) for a, b in zip(losses, read_golden("losses")["loss"], strict=False)) > 1e-4


def test_the_golden_run_has_short_batches_and_no_batch_twice() -> None:
    golden = read_golden("losses")
    assert len(set(golden["blocks"])) == STEPS
    assert min(golden["tokens"]) < max(golden["tokens"]) == 8 * 32

"""What is gathered from a run's records."""

import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from clm_dist.files.record_types import Record
from clm_dist.files.records import read_records
from clm_dist.files.spent import Spent
from clm_dist.report.history import History
from tests.support.histories import history, write_history


def spent_of(*records: dict[str, Any]) -> tuple[dict[str, float], bool]:
    spent = Spent()
    for record in records:
        spent.add(cast(Record, record))
    return {part: round(seconds, 6) for part, seconds in spent.parts()}, spent.is_whole


START = {"kind": "start", "step": 0, "time": 100.0, "startup": 20.0}


def step(number: int, seconds: float = 10.0) -> dict[str, Any]:
    return {"kind": "step", "step": number, "seconds": seconds, "data_wait": 1.0}


def phase(name: str, time: float) -> dict[str, Any]:
    return {"kind": "phase", "step": 0, "phase": name, "time": time}


def test_the_parts_of_the_time_add_up_to_the_whole() -> None:
    records = [
        START,
        phase("Evaluating the untouched model", 101.0),
        {"kind": "eval", "step": 0, "seconds": 4.0},
        phase("Training", 106.0),
        step(1),
        {"kind": "checkpoint", "step": 1, "blocked": 2.0},
        step(2),
        phase("Writing the model", 130.0),
        phase("Evaluating the written model", 133.0),
        {"kind": "verify", "step": 2, "seconds": 5.0},
    ]
    parts = {"compute": 16.0, "data": 2.0, "checkpoint": 2.0, "evaluation": 4.0, "model": 8.0, "start-up": 20.0}
    assert spent_of(*records) == (parts | {"other": 6.0}, True)
    # From 20 s before the start to the end of the last evaluation.
    assert sum(parts.values()) + 6 == 20 + 38


def test_a_restart_costs_the_wait_and_what_is_trained_again() -> None:
    failure = {"kind": "failure", "step": 1, "worker": 0, "error": "", "time": 130.0}
    again = START | {"time": 200.0, "startup": 60.0, "lost": 15.0}
    parts, _ = spent_of(START, phase("Training", 100.0), step(1), failure, again, phase("Training", 200.0), step(2))
    assert parts == {"compute": 18.0, "data": 2.0, "start-up": 20.0, "restarts": 75.0}


def test_records_of_earlier_versions_have_no_times() -> None:
    start = {"kind": "start", "step": 0, "time": 100.0}
    evaluation = {"kind": "eval", "step": 0}
    assert spent_of(start, evaluation, {"kind": "phase", "step": 0}, step(1)) == ({"compute": 9.0, "data": 1.0}, False)


def test_a_history_has_every_curve_and_the_peaks() -> None:
    of = History.of(cast(list[Record], list(history(400))))
    assert {*of.curves} == {"loss", "eval", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_bytes"}
    assert (of.step, of.num_steps, of.num_starts, of.compiled) == (400, 400, 2, True)
    assert of.peak_memory == 60 * 2**30 + 400
    assert of.hosts == ("node-a", "node-b")
    # Half of them have no step 100, which is left out.
    assert len(of.curves["loss"].points()) == 399


def test_workers_that_are_not_started_again_are_a_problem() -> None:
    failure = {"kind": "failure", "step": 7, "worker": 2, "error": "gone", "time": 1.0}
    (mark,) = History.of([cast(Record, failure)]).marks["problem"].marks
    assert (mark.step, mark.text) == (7, "worker 2 failed after step 7: gone")


def test_the_model_that_is_kept_is_marked_once_where_it_is_not_the_last() -> None:
    ends = [{"kind": "final", "step": 9, "kept": kept, "stopped_early": False} for kept in (9, 4, 4)]
    assert "kept" not in History.of([cast(Record, ends[0])]).marks
    (mark,) = History.of([cast(Record, end) for end in ends]).marks["kept"].marks
    assert mark.step == 4


@pytest.mark.parametrize("num_steps", [20_000])
def test_memory_does_not_grow_with_the_steps(num_steps: int, tmp_path: Path) -> None:
    peaks = []
    for size in (num_steps, 4 * num_steps):
        write_history(tmp_path / "metrics.jsonl", size)
        tracemalloc.start()
        History.of(read_records(tmp_path / "metrics.jsonl"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    for before, after in pairwise(peaks):
        assert after < 1.3 * before

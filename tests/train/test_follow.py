"""What the driver shows of a run's metrics."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from clm_dist.files.record_types import Record
from clm_dist.files.records import replace_records
from clm_dist.files.run_dir import RunDir
from clm_dist.train.ray.follow import Follower
from clm_dist.train.recorder import Recorder
from tests.support.notes import Notes
from tests.support.runs import checkpoints_of
from tests.train.test_record import sent


def test_a_restart_shows_where_it_goes_on_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, notes, exported = RunDir(tmp_path), Notes(), list[int]()
    recorder = Recorder(run, checkpoints_of(run), num_micros=1, num_tokens=4, keep=2)
    follower = Follower(run, notes, 0, lambda path, step: exported.append(step))
    evaluation = {"kind": "eval", "step": 0, "epoch": 0.0, "micros": [(0, 4.0, 4, 8)]}
    start = {"kind": "start", "num_steps": 9}
    recorder.receive([sent(start | {"step": 0}, evaluation=evaluation)])
    recorder.receive([sent({"kind": "export", "step": 2, "epoch": 1.0, "path": "x"})])
    recorder.receive([sent({"kind": "checkpoint", "step": 2}, {"kind": "checkpoint", "step": 4})])
    follower.look()
    assert (len(notes.notes), exported) == (1, [2])

    def look_at_once(path: Path, records: Iterable[Record], *, keep: Callable[[Record], bool]) -> None:
        replace_records(path, records, keep=keep)
        follower.look()

    # The follower may look between any two writes.
    monkeypatch.setattr("clm_dist.train.recorder.replace_records", look_at_once)
    recorder.receive([sent(start | {"step": 2})])
    follower.look()
    assert (notes.notes[1:], exported) == (["Resuming from the checkpoint of step 2"], [2])


def test_a_start_is_found_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    run, notes = RunDir(tmp_path), Notes()
    follower = Follower(run, notes, 0, lambda path, step: None)
    lines = [
        {"step": 0, "num_steps": 9, "kind": "start"},
        {"step": 3, "error": "killed", "worker": 0, "kind": "failure"},
        {"step": 2, "num_steps": 9, "kind": "start"},
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    follower.look()
    assert notes.notes == ["Resuming from the checkpoint of step 2"]

"""What the driver shows of a run's metrics."""

import io
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from rich.console import Console

from clm_dist.files.record_types import Record
from clm_dist.files.records import append_records, replace_records
from clm_dist.files.run_dir import RunDir
from clm_dist.progress import LineProgress
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
    saved = {"kind": "checkpoint", "bytes": 3 * 2**30, "seconds": 1.26}
    recorder.receive([sent(saved | {"step": 2}, saved | {"step": 4})])
    follower.look()
    assert notes.notes[1:] == [f"Step {step}: checkpoint saved, 3,072 MiB in 1.3 s" for step in (2, 4)]
    assert exported == [2]
    del notes.notes[1:]

    def look_at_once(path: Path, records: Iterable[Record], *, keep: Callable[[Record], bool]) -> None:
        replace_records(path, records, keep=keep)
        follower.look()

    # The follower may look between any two writes.
    monkeypatch.setattr("clm_dist.train.recorder.replace_records", look_at_once)
    recorder.receive([sent(start | {"step": 2})])
    follower.look()
    assert (notes.notes[1:], exported) == (["Resuming from the checkpoint of step 2"], [2])


def test_time_is_counted_by_what_the_workers_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run, progress = RunDir(tmp_path), LineProgress(Console(file=io.StringIO()))
    follower = Follower(run, progress, 0, lambda path, step: None)
    figures = {"epoch": 0.0, "loss": 1.0, "perplexity": 2.7}
    for seconds, record in (
        (20, {"kind": "start", "step": 0, "num_steps": 2}),
        (0, {"kind": "phase", "step": 0, "phase": "Evaluating the untouched model"}),
        (3, {"kind": "eval", "step": 0, **figures}),
        (0, {"kind": "phase", "step": 0, "phase": "Training"}),
        (50, {"kind": "checkpoint", "step": 1, "blocked": 8.0}),
        (0, {"kind": "failure", "step": 1, "worker": 0, "error": "killed"}),
        (25, {"kind": "start", "step": 1, "num_steps": 2}),
        (0, {"kind": "phase", "step": 1, "phase": "Training"}),
        (10, {"kind": "phase", "step": 2, "phase": "Evaluating"}),
        (4, {"kind": "eval", "step": 2, **figures}),
        (0, {"kind": "phase", "step": 2, "phase": "Writing the model"}),
        (5, {"kind": "phase", "step": 2, "phase": "Evaluating the written model"}),
        (6, {"kind": "verify", "step": 2, **figures}),
    ):
        now[0] += seconds
        append_records(run.metrics, [record])  # type: ignore[list-item]
        follower.look()
    assert progress.times.describe() == (
        "2:03 (starting 0:45, training 0:52, evaluating 0:13, waiting for checkpoints 0:08, writing the model 0:05)"
    )


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


def test_an_early_end_and_the_model_that_is_kept_are_said(tmp_path: Path) -> None:
    run, notes = RunDir(tmp_path), Notes()
    follower = Follower(run, notes, 0, lambda path, step: None)
    for record in (
        {"kind": "final", "step": 5, "kept": 3, "stopped_early": True},
        {"kind": "final", "step": 8, "kept": 8, "stopped_early": False},
    ):
        append_records(run.metrics, [record])  # type: ignore[list-item]
    follower.look()
    assert notes.notes == [
        "Stopping early, after step 5: the evaluations no longer get better",
        "Keeping the model of step 3, which has the lowest eval loss",
    ]


def test_a_step_is_shown_with_its_figures_and_the_last_perplexity(tmp_path: Path) -> None:
    class Figures(Notes):
        def update(self, done: int, **figures: str) -> None:
            shown.append((done, list(figures.items())))

    shown: list[tuple[int, list[tuple[str, str]]]] = []
    run = RunDir(tmp_path)
    follower = Follower(run, Figures(), 0, lambda path, step: None)
    step = {"kind": "step", "epoch": 0.125, "loss": 2.5, "tokens_per_s": 9100.4, "mfu": None}
    memory = {"mfu": 0.416, "memory_bytes": 3 * 2**29}
    for record in (
        {"kind": "start", "step": 0, "num_steps": 9},
        # A log has the first figures at once, which are to be those of a step.
        {"kind": "eval", "step": 0, "epoch": 0.0, "loss": 3.0, "perplexity": 20.0},
        {"step": 1, **step},
        {"kind": "eval", "step": 1, "epoch": 0.125, "loss": 2.0, "perplexity": 7.389},
        {"step": 2, **step, **memory},
        # What that evaluation was of is trained again.
        {"kind": "start", "step": 0, "num_steps": 9},
        {"step": 1, **step},
    ):
        append_records(run.metrics, [record])  # type: ignore[list-item]
        follower.look()
    figures = [("loss", "2.5000"), ("tokens_per_s", "9,100"), ("epoch", "0.12")]

    def after(perplexity: str) -> list[tuple[str, str]]:
        return [figures[0], ("perplexity", perplexity), *figures[1:]]

    assert shown == [
        (0, []),
        (1, after("20.00")),
        (1, after("7.39")),
        (2, [*after("7.39"), ("MFU", "42%"), ("memory", "1.5 GiB")]),
        (1, figures),
    ]

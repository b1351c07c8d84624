"""What is sent to trackers, and that no fault of theirs is one of the run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from clm_dist.files.atomic import read_json, write_json
from clm_dist.files.record_types import Record
from clm_dist.files.records import append_records, replace_records
from clm_dist.files.run_dir import RunDir
from clm_dist.train.trackers.processes import tracked
from clm_dist.train.trackers.send import send
from clm_dist.train.trackers.services import Row, rows_of
from tests.support.disks import mode
from tests.support.fake_trackio import write_fake_trackio
from tests.support.notes import Notes
from tests.support.processes import running
from tests.train.test_tracker_services import run, step

__all__ = ["run"]

EVAL: Any = {"kind": "eval", "step": 2, "epoch": 1.0, "loss": 1.25, "perplexity": None, "num_tokens": 9}
PHASE: Any = {"kind": "phase", "step": 2, "phase": "Evaluating"}


@dataclasses.dataclass
class Kept:
    """A tracker that keeps what it receives."""

    url: str | None = "https://there"
    started: list[str | None] = dataclasses.field(default_factory=list)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    records: list[Record] = dataclasses.field(default_factory=list)
    status: str | None = None
    on_add: Callable[[], None] = lambda: None

    def start(self, name: str, fields: Mapping[str, Any], directory: Path, run_id: str | None) -> str:
        self.started.append(run_id)
        self.fields = fields
        return run_id or "made"

    def add(self, records: Sequence[Record]) -> None:
        self.records += records
        self.on_add()

    @property
    def rows(self) -> list[Row]:
        return rows_of(self.records)

    def finish(self, status: str) -> None:
        self.status = status


def over() -> threading.Event:
    ended = threading.Event()
    ended.set()
    return ended


def steps_of(rows: Sequence[Row]) -> list[tuple[str, int]]:
    return [(row.kind, row.step) for row in rows]


def test_steps_and_evaluations_are_sent_with_the_fields_of_the_job(run: RunDir) -> None:
    tracker = Kept()
    append_records(run.metrics, [step(1), step(2), PHASE, EVAL])
    write_json(run.result, {"status": "preempted"})
    send("kept", tracker, run, over())
    assert tracker.rows == [
        Row("step", 1, {"step/loss": 1.5}),
        Row("step", 2, {"step/loss": 1.5}),
        Row("eval", 2, {"eval/loss": 1.25, "eval/num_tokens": 9}),
    ]
    assert (tracker.fields["train.epochs"], tracker.fields["data.path"]) == (3, "text.jsonl")
    assert not any(field.startswith(("cluster.slurm", "cluster.k8s", "hub.")) for field in tracker.fields)
    assert tracker.status == "preempted"
    assert read_json(run.tracker_state("kept")) == {
        "id": "made",
        "url": "https://there",
        "sent": {"step": 2, "eval": 2},
    }
    assert mode(run.tracker_state("kept")) == 0o600


def test_the_next_start_goes_on_in_the_same_run_with_what_was_not_sent(run: RunDir) -> None:
    append_records(run.metrics, [step(1), step(2)])
    first, second = Kept(), Kept()
    send("kept", first, run, over())
    assert first.status == "failed"  # no result: the driver was killed
    # The evaluation was lost with the workers, and comes after steps that were sent.
    append_records(run.metrics, [EVAL, step(3)])
    send("kept", second, run, over())
    assert (first.started, second.started) == ([None], ["made"])
    assert steps_of(second.rows) == [("eval", 2), ("step", 3)]


@pytest.mark.parametrize("last", [4, 2])
def test_a_start_of_workers_neither_loses_nor_repeats_steps(run: RunDir, last: int) -> None:
    ended = threading.Event()
    tracker = Kept()

    def start_again() -> None:
        tracker.on_add = lambda: None
        # Written after the last look, and then before the start that a reader begins with.
        append_records(run.metrics, [step(4)])
        start: Any = {"kind": "start", "step": last}
        replace_records(run.metrics, [start], keep=lambda record: record["step"] <= last)
        append_records(run.metrics, [step(number) for number in range(last + 1, 7)])
        ended.set()

    tracker.on_add = start_again
    append_records(run.metrics, [step(1), step(2), step(3)])
    send("kept", tracker, run, ended)
    assert steps_of(tracker.rows) == [("step", number) for number in range(1, 7)]


def test_what_a_tracker_took_before_it_failed_is_not_sent_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clm_dist.train.trackers.send._BATCH", 2)
    tracker = Kept()
    append_records(run.metrics, [step(number) for number in range(1, 6)])

    def fail_second() -> None:
        if len(tracker.rows) > 2:
            raise RuntimeError("it is away")

    tracker.on_add = fail_second
    with pytest.raises(RuntimeError, match="away"):
        send("kept", tracker, run, over())
    assert read_json(run.tracker_state("kept"))["sent"] == {"step": 2}


# The processes.


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    return lambda **faults: write_fake_trackio(tmp_path / "fake", monkeypatch, **faults)


def test_a_tracker_gets_what_comes_while_the_run_goes_on(run: RunDir, fake: Callable[..., Path]) -> None:
    calls, notes = fake(), Notes()
    with tracked(["trackio", "trackio"], run, notes) as look:
        append_records(run.metrics, [step(1)])
        while not (calls.exists() and "log" in calls.read_text()):
            time.sleep(0.05)
        look()
        append_records(run.metrics, [step(2)])
        write_json(run.result, {"status": "done"})
    assert [json.loads(line)[0] for line in calls.read_text().splitlines()] == ["init", "log", "log", "finish"]
    assert (notes.notes, notes.stages) == ([], ["Waiting for trackers"])
    assert mode(run.trackers) == 0o700


@pytest.mark.parametrize(
    ("faults", "note"),
    [
        ({"init": "raise RuntimeError('no such project')"}, "trackio fails (RuntimeError: no such project);"),
        ({"log": "raise SystemExit(0)"}, "trackio fails (SystemExit: 0);"),
        ({"log": "os.kill(os.getpid(), 11)"}, "trackio ended by signal 11;"),
        ({"init": "time.sleep(600)"}, "trackio did not take all figures within 0.5 s after the end;"),
        ({"log": "time.sleep(600)"}, "trackio did not take all figures within 0.5 s after the end;"),
        ({"finish": "time.sleep(600)"}, "trackio did not take all figures within 0.5 s after the end;"),
        ({"log": "signal.signal(signal.SIGALRM, signal.SIG_IGN); time.sleep(600)"}, "trackio did not take all figures"),
    ],
)
def test_no_fault_of_a_tracker_is_one_of_the_run(
    run: RunDir, fake: Callable[..., Path], faults: dict[str, str], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clm_dist.train.trackers.processes._KILL_S", 0.5)
    calls, notes = fake(**faults), Notes()
    append_records(run.metrics, [step(1)])
    with tracked(["trackio"], run, notes, limit_s=0.5):
        while not (calls.exists() and next(iter(faults)) in calls.read_text().replace('"init"', "init")):
            if "finish" in faults:
                break
            time.sleep(0.05)
    (said,) = notes.notes
    assert said.startswith(note)
    assert str(run.tracker_log("trackio")) in said


def test_the_address_of_a_run_is_shown_once(run: RunDir, fake: Callable[..., Path]) -> None:
    fake(init="time.sleep(600)")
    write_json(run.tracker_state("trackio"), {"id": "old", "url": "https://there/old", "sent": {}})
    notes = Notes()
    with tracked(["trackio"], run, notes, limit_s=0.1) as look:
        look()
        look()
    assert notes.notes[0] == "trackio: https://there/old"
    assert [note for note in notes.notes if "there" in note] == notes.notes[:1]


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        ("raise RuntimeError('no such project')", "trackio fails (RuntimeError: no such project);"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "trackio ended by signal 9;"),
    ],
)
def test_a_fault_is_told_once_and_while_the_run_goes_on(
    run: RunDir, fake: Callable[..., Path], fault: str, note: str
) -> None:
    fake(init=fault)
    notes = Notes()
    with tracked(["trackio"], run, notes) as look:
        while not notes.notes:
            look()
            time.sleep(0.05)
        look()
    (said,) = notes.notes
    assert said.startswith(note)


def test_signals_that_stop_a_run_do_not_stop_what_is_sent_of_it(run: RunDir, fake: Callable[..., Path]) -> None:
    calls, notes = fake(), Notes()
    with tracked(["trackio"], run, notes):
        pid = started_pid(calls)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(pid, number)
        append_records(run.metrics, [step(1)])
    assert '"finish"' in calls.read_text()
    assert notes.notes == []


def test_a_process_ends_with_its_driver_also_where_its_tracker_hangs(run: RunDir, fake: Callable[..., Path]) -> None:
    calls = fake(init="time.sleep(600)")
    program = (
        "import sys, time; from pathlib import Path; from clm_dist.files.run_dir import RunDir\n"
        "from clm_dist.progress import Silent; from clm_dist.train.trackers.processes import tracked\n"
        "with tracked(['trackio'], RunDir(Path(sys.argv[1])), Silent(), limit_s=0.5): time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(run.root)]) as driver:
        pid = started_pid(calls)
        session = os.getsid(pid)
        driver.kill()
    assert session == pid  # a Ctrl-C at the driver's terminal does not reach it
    while running([pid]):
        time.sleep(0.05)


def started_pid(calls: Path) -> int:
    """The process of the tracker, once it has begun."""
    while not (calls.exists() and calls.read_text().endswith("\n")):
        time.sleep(0.05)
    return int(json.loads(calls.read_text().splitlines()[0])[2])


def test_nobody_waits_after_the_second_ctrl_c(run: RunDir, fake: Callable[..., Path]) -> None:
    calls = fake(finish="time.sleep(2)")
    notes = Notes()
    with pytest.raises(KeyboardInterrupt), tracked(["trackio"], run, notes):
        while not calls.exists():
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert notes.stages == []
    # It still gets the end.
    while "finish" not in calls.read_text():
        time.sleep(0.05)


def test_a_directory_that_cannot_be_written_is_told(run: RunDir, fake: Callable[..., Path]) -> None:
    fake()
    run.trackers.rmdir()
    run.trackers.write_text("")
    notes = Notes()
    with tracked(["trackio"], run, notes):
        pass
    (said,) = notes.notes
    assert said.startswith("trackio fails (")

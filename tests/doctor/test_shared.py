"""Storage that nodes share, or do not."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from clm_dist.doctor.finding import Finding
from clm_dist.doctor.need import Place
from clm_dist.doctor.shared import (
    LeaseTrial,
    Locked,
    Seen,
    judge_existing,
    judge_locks,
    judge_objects,
    judge_seen,
    meeting_at,
    read_object,
    remove_object,
    write_object,
)

RUNS = Place("runs", "/shared/runs", "--runs", is_shared=True)


def test_nodes_that_meet_see_what_each_wrote_and_leave_nothing(tmp_path: Path) -> None:
    meeting = meeting_at(str(tmp_path))
    assert [meeting.write(node) for node in ("a", "b")] == [None, None]
    assert meeting.read(["a", "b"]) == Seen()
    meeting.remove()
    assert not list(tmp_path.iterdir())


def test_what_is_missing_or_old_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clm_dist.doctor.shared._SEEN_S", 0.0)
    meeting = meeting_at(str(tmp_path))
    meeting.write("a")
    meeting.write("b")
    (Path(meeting.directory) / "b").write_text("old")
    assert meeting.read(["a", "b", "c"]) == Seen(missing=("c",), different=("b",))


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert meeting_at(str(tmp_path / "file")).write("a") == os.strerror(20)


def test_of_two_that_want_a_lease_at_once_one_gets_it(tmp_path: Path) -> None:
    trials = [LeaseTrial(str(tmp_path)) for _ in range(2)]
    end = time.monotonic() + 20
    while any(trial.result is None for trial in trials):
        assert time.monotonic() < end
        time.sleep(0.01)
    results = [trial.result for trial in trials]
    assert sorted(result.held for result in results if result) == [False, True]
    for trial in trials:
        trial.release()
    assert not list(tmp_path.iterdir())


def severities(findings: Any) -> list[tuple[str, tuple[str, ...]]]:
    found: list[Finding] = list(findings)
    return [(finding.severity, finding.nodes) for finding in found]


def test_a_node_that_lacks_the_directory_is_named() -> None:
    (finding,) = judge_existing(RUNS, {"a": "/shared", "b": "/", "c": "/shared"})
    assert (finding.severity, finding.nodes) == ("error", ("b",))
    assert "/shared is not there" in finding.what
    assert not list(judge_existing(RUNS, {"a": "/shared", "b": "/shared"}))


def test_what_nodes_do_not_see_of_each_other_is_named() -> None:
    (finding,) = judge_seen(RUNS, {"a": Seen(missing=("b",)), "b": Seen()})
    assert (finding.nodes, "what b wrote is not there" in finding.what) == (("a",), True)
    assert severities(judge_seen(RUNS, {"a": Seen(different=("b",)), "b": Seen()})) == [("error", ("a",))]
    assert severities(judge_seen(RUNS, {"a": Seen(problem="stale"), "b": Seen()})) == [("error", ("a",))]
    assert severities(judge_seen(RUNS, {"a": Seen(), "b": Seen()})) == [("ok", ())]


@pytest.mark.parametrize(
    ("locks", "expected"),
    [
        ({"a": Locked(held=True), "b": Locked(holder="a")}, [("ok", ())]),
        ({"a": Locked(held=True), "b": Locked(held=True)}, [("error", ())]),
        ({"a": Locked(held=True), "b": None}, [("unchecked", ())]),
        ({"a": Locked(held=True), "b": Locked(problem="no space")}, [("unchecked", ("b",))]),
        ({"a": Locked(holder="c"), "b": Locked(holder="c")}, [("unchecked", ())]),
    ],
)
def test_a_lease_has_one_holder(locks: dict[str, Locked | None], expected: list[Any]) -> None:
    assert severities(judge_locks(RUNS, locks)) == expected


def test_an_object_is_written_read_and_removed(bucket: Any) -> None:
    url = "s3://texts/a run's checkpoints"
    assert write_object(url, "token") is None
    assert read_object(url, "token") is None
    problem = read_object(url, "other")
    assert problem
    assert not problem[1]
    remove_object(url, "token")
    assert not bucket.find("texts")


def test_storage_that_is_not_there_is_told(bucket: Any) -> None:
    problem = write_object("s3://no-such-bucket/x", "token")
    assert problem
    assert not bucket.exists("no-such-bucket")
    (finding,) = judge_objects(Place("checkpoints", "s3://x", "checkpoint.path", is_shared=True), {"a": problem})
    assert (finding.severity, finding.nodes) == ("error", ("a",))
    assert severities(judge_objects(RUNS, {"a": None, "b": None})) == [("ok", ())]

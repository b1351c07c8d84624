"""On what the time of a command is spent."""

import io
import time

import pytest
from rich.console import Console

from clm_dist.progress import LineProgress
from clm_dist.timing import Times


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_stages_add_up_to_the_whole(clock: list[float]) -> None:
    progress = LineProgress(Console(file=io.StringIO()))
    for stage, kind, seconds in (
        ("Loading", None, 4.4),
        ("Reading", "prepare", 1.4),
        ("Writing", None, 1.4),
        ("Training", "training", 60.4),
        ("Evaluating", "evaluation", 0.2),
        ("Training", "training", 10.0),
    ):
        progress.start(stage, kind=kind)  # type: ignore[arg-type]
        clock[0] += seconds
    # 77.8 s; what is rounded to nothing is not said.
    assert progress.times.describe() == "1:18 (starting 0:04, preparing 0:03, training 1:11)"
    progress.times.begin("end")
    clock[0] += 3600
    assert progress.times.describe() == "1:01:18 (starting 0:04, preparing 0:03, training 1:11, the rest 1:00:00)"


def test_seconds_that_training_waited_are_not_training(clock: list[float]) -> None:
    times = Times()
    times.begin("training")
    clock[0] += 30
    times.move("checkpoints", 12.0)
    assert times.describe() == "0:30 (training 0:18, waiting for checkpoints 0:12)"
    # Never more than there was, so nothing is less than nothing.
    times.move("checkpoints", 100.0)
    assert times.describe() == "0:30 (waiting for checkpoints 0:30)"

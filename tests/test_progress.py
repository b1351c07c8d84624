"""What a person sees while a stage works."""

import io
import re
import time

import pytest
from rich.console import Console

from clm_dist.progress import LineProgress, TerminalProgress, open_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets; its one element is the time."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def work(progress: LineProgress | TerminalProgress, clock: list[float]) -> None:
    with progress:
        progress.start("Training", total=40, unit="step")
        progress.update(10)  # a resumed run begins here
        clock[0] += 2
        progress.update(20, loss="2.5000", tokens_per_s="9,100")
        progress.note("Step 20: eval loss 2.4")


def test_a_log_file_gets_plain_lines(clock: list[float]) -> None:
    log = io.StringIO()
    progress = LineProgress(Console(file=log), interval_s=1)
    work(progress, clock)
    times, lines = zip(*((line[:19], line[20:]) for line in log.getvalue().splitlines()), strict=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", when) for when in times)
    assert [lines[0], lines[2]] == ["Training", "Step 20: eval loss 2.4"]
    assert re.fullmatch(r"Training · step 20/40 · loss 2.5000 · tokens/s 9,100 · 0:04 left", lines[1])
    assert "\x1b" not in log.getvalue()


def test_time_left_counts_only_this_process_steps(clock: list[float]) -> None:
    log = io.StringIO()
    progress = LineProgress(Console(file=log), interval_s=1)
    progress.start("Training", total=1000, unit="step")
    progress.update(900)
    clock[0] = 60.0
    progress.update(910)
    assert log.getvalue().splitlines()[-1].endswith("step 910/1000 · 9:00 left")


def test_a_terminal_gets_a_line_that_moves_and_notes_that_stay(clock: list[float]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    assert isinstance(open_progress(console), TerminalProgress)
    assert isinstance(open_progress(Console(file=io.StringIO())), LineProgress)
    work(TerminalProgress(console), clock)
    shown = screen.getvalue()
    assert re.search(r"Training · step 20/40 · loss 2.5000 · tokens/s 9,100 · 0:04 left", shown)
    assert "Step 20: eval loss 2.4\n" in shown
    assert "\x1b[2K" in shown

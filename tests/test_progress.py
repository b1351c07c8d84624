"""What a person sees while a stage works."""

import io
import os
import re
import signal
import time
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from clm_dist.progress import LineProgress, TerminalProgress, open_progress
from clm_dist.signals import handling


class Screen(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


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
    work(LineProgress(Console(file=log)), clock)
    times, lines = zip(*((line[:19], line[20:]) for line in log.getvalue().splitlines()), strict=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", when) for when in times)
    assert lines == (
        "Training",
        "Training, step 20/40, 0:04 left, loss 2.5000, tokens/s 9,100",
        "Step 20: eval loss 2.4",
    )
    assert "\x1b" not in log.getvalue()


def test_a_log_has_the_first_step_at_once_and_then_a_line_every_minute(clock: list[float]) -> None:
    log = io.StringIO()
    progress = LineProgress(Console(file=log))
    progress.start("Training", total=3600, unit="step")
    for step in range(1, 3601):
        clock[0] += 2
        progress.update(step, loss=f"{step}")
    steps = [int(line.rpartition("loss ")[2]) for line in log.getvalue().splitlines()[1:]]
    assert steps[:7] == [1, 6, 11, 16, 21, 26, 56]
    assert {after - before for before, after in pairwise(steps[6:])} == {30}
    assert steps[-1] > 3600 - 30


def test_time_left_counts_only_this_process_steps(clock: list[float]) -> None:
    log = io.StringIO()
    progress = LineProgress(Console(file=log))
    progress.start("Training", total=1000, unit="step")
    progress.update(900)
    clock[0] = 60.0
    progress.update(910)
    assert log.getvalue().splitlines()[-1].endswith("step 910/1000, 9:00 left")


def test_new_workers_have_a_speed_of_their_own(clock: list[float]) -> None:
    log = io.StringIO()
    progress = LineProgress(Console(file=log))
    for step, seconds in ((50, 60), (51, 12)):  # a checkpoint was saved after the last step
        progress.start("Starting workers", kind="start")
        progress.start("Training", total=100, unit="step")
        progress.update(step)
        clock[0] += seconds
        progress.update(step + 1, loss="1")
    left = [line[20:] for line in log.getvalue().splitlines() if "left" in line]
    assert left == ["Training, step 51/100, 49:00 left, loss 1", "Training, step 52/100, 9:36 left, loss 1"]


def test_a_terminal_gets_a_line_that_moves_and_notes_that_stay(clock: list[float]) -> None:
    screen = Screen()
    console = Console(file=screen, force_terminal=True, width=100)
    work(TerminalProgress(console), clock)
    shown = re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())
    assert re.search(r"Training [━╺]{10} step 20/40, 0:04 left, loss 2.5000, tokens/s 9,100", shown)
    assert "Step 20: eval loss 2.4\n" in shown
    assert "\x1b[2K" in shown


@pytest.mark.parametrize(
    ("file", "environment", "display"),
    [
        (Screen(), {"TERM": "xterm"}, TerminalProgress),
        # Moves no cursor.
        (Screen(), {"TERM": "dumb"}, LineProgress),
        (io.StringIO(), {"TERM": "xterm"}, LineProgress),
        # Asks for colours, as jobs of CI do; a log is no terminal for that.
        (io.StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}, LineProgress),
    ],
    ids=["terminal", "dumb", "file", "coloured file"],
)
def test_what_is_no_terminal_gets_lines(file: io.StringIO, environment: dict[str, str], display: type) -> None:
    assert type(open_progress(Console(file=file, _environ=environment))) is display


@pytest.mark.parametrize("kind", ["terminal", "log"])
def test_a_note_of_a_signal_is_printed_once_and_so_is_what_it_interrupts(kind: str) -> None:
    class Interrupted(Screen):
        """A signal comes while it is written to."""

        def write(self, text: str) -> int:
            written = super().write(text)
            if "first" in text and not handled:
                handled.append(signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGUSR1)
            return written

    handled: list[int] = []
    screen = Interrupted()
    console = Console(file=screen, force_terminal=kind == "terminal", width=100)
    progress = TerminalProgress(console) if kind == "terminal" else LineProgress(console)

    def note(*_: Any) -> None:
        progress.note("the handler's")

    with handling([signal.SIGUSR1], note):
        progress.note("the first")
        progress.note("the last")
    assert re.findall("the .*", screen.getvalue()) == ["the first", "the handler's", "the last"]

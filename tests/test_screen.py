"""The live line on a terminal: one line in every frame, whatever the terminal."""

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from typing import Any

import pyte
import pytest

# It draws a frame when it is told to, not in a thread: none may be half of an old and half of a new width.
_PROGRAM = """
import sys
from clm_dist.progress import err, open_progress

figures = {"loss": "3.1234", "perplexity": "24.12", "tokens_per_s": "123,456", "epoch": "0.12", "MFU": "41%",
           "memory": "23.4 GiB"}
progress = open_progress(err)
progress._live.auto_refresh = False
with progress:
    def show():
        for number in range(6):
            progress.update(number, **figures)
            progress._live.refresh()

    progress.start("Starting 16 to 32 workers (usually 10 to 40 s)", kind="start")
    progress._live.refresh()
    for half in range(2):
        progress.start("Training", total=12000, unit="step", kind="training")
        show()
        progress.note(f"Note {half}: the loss of step 20 is far above those before it (7.5; blocks 1, 2, 3, 4)")
        show()
        progress.start("Tokenising the eval split", total=6, unit="MiB")
        show()
        print("half", half, flush=True)
        sys.stdin.readline()
"""
_NEW_FRAME = re.compile(rb"(?=\r\x1b\[2K)")
_SPINNERS = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏-\\|/"


class Terminal:
    """A terminal of some width with a program on its standard error."""

    def __init__(self, columns: int, **environment: str) -> None:
        self._screen = pyte.Screen(columns, 40)
        self._stream = pyte.ByteStream(self._screen)
        self._here, there = os.openpty()
        self.resize(columns)
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
        self.program = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=there,
            text=True,
            env=env | {"TERM": "xterm-256color"} | environment,
        )
        os.close(there)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._here, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._screen.resize(40, columns)

    def until(self, line: str) -> bytes:
        """What the program writes to the terminal before this line of its standard output."""
        assert self.program.stdout
        written, is_there = b"", False
        while True:
            files: list[Any] = [self._here] if is_there else [self._here, self.program.stdout]
            ready = select.select(files, [], [], 0.1 if is_there else 60)[0]
            if self._here in ready:
                written += os.read(self._here, 65536)
            elif is_there:
                return written
            else:
                assert ready, "the line does not come"
                assert self.program.stdout.readline() == line
                is_there = True

    def frames(self, written: bytes) -> Iterator[list[str]]:
        """The lines of the screen after each frame."""
        for frame in _NEW_FRAME.split(written):
            self._stream.feed(frame)
            yield [line.rstrip() for line in self._screen.display if line.strip()]

    def go_on(self) -> None:
        assert self.program.stdin
        self.program.stdin.write("\n")
        self.program.stdin.flush()

    def close(self) -> None:
        with self.program:
            self.program.kill()
        os.close(self._here)


def check(terminal: Terminal, half: int, columns: int) -> set[str]:
    """Check that each frame has one live line and whole figures; return the live lines."""
    lives = set()
    frames = list(terminal.frames(terminal.until(f"half {half}\n")))[1:]
    for lines in frames:
        live = [line for line in lines if line[0] in _SPINNERS]
        if not live:  # a note is written before the line under it
            continue
        assert len(live) == 1, lines
        assert lines[-1] == live[0], lines
        notes = " ".join(line.strip() for line in lines[:-1])
        # What is above it are the notes alone: nothing is left of an earlier frame.
        assert not re.search("Training|Tokenising|Starting|GiB", notes), lines
        assert len(live[0]) <= columns
        lives.add(live[0][2:])
    assert len(frames) >= 18
    return lives


FIGURES = ["loss 3.1234", "perplexity 24.12", "tokens/s 123,456", "epoch 0.12", "MFU 41%", "memory 23.4 GiB"]
BAR = r"[━╸╺ -]*"


@pytest.mark.parametrize(
    "environment", [{}, {"NO_COLOR": "1"}, {"COLUMNS": "300"}, {"PYTHONIOENCODING": "ascii"}], ids=str
)
@pytest.mark.parametrize("columns", [20, 40, 80, 120, 200])
def test_every_frame_is_one_line_of_whole_figures(columns: int, environment: dict[str, str]) -> None:
    terminal = Terminal(columns, **environment)
    try:
        for half, width in enumerate((columns, max(20, columns // 2))):
            terminal.resize(width)
            if half:
                terminal.go_on()
            lines = check(terminal, half, width)
            # The bar is as long in every frame, without colours too.
            for unit in ("step ", "MiB "):
                assert len({line.index(unit) for line in lines if unit in line}) <= 1
            for line in lines:
                if line.startswith("Training"):
                    shown = re.fullmatch(rf"Training ?{BAR}(?:step \d/12000(?:, [\d:]+(?: left)?(.*))?)?", line)
                    assert shown, line
                    # The figures in their order, from the first on, each whole.
                    figures = (shown[1] or "").split(", ")[1:]
                    given = ", ".join(FIGURES)
                    assert given.startswith(", ".join(figures)), line
                    assert (width < 200) or len(figures) >= 6
    finally:
        terminal.close()

"""The display while a stage works: a live line on a terminal, plain lines in a log file."""

import os
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from clm_dist.config.shown import printable
from clm_dist.pace import Pace
from clm_dist.timing import Kind, Times, clock

_LOG_WIDTH = 120
_SOON_S, _FIRST_INTERVAL_S, _INTERVAL_S = 60, 10, 60
"""A log has a line every 10 s in the first minute of a stage with figures, and every minute after it."""


def _width(stream: TextIO | None) -> int | None:
    return None if stream is not None and stream.isatty() else _LOG_WIDTH


# A stream that is closed is None.
out = Console(width=_width(sys.stdout), highlight=False)
err = Console(stderr=True, width=_width(sys.stderr), highlight=False)
nowhere = Console(quiet=True)


class Progress(Protocol):
    """Where a stage says how far it is."""

    def start(self, stage: str, *, total: int | None = None, unit: str = "", kind: Kind | None = None) -> None:
        """Begin a stage of `total` units; None where the end is not known.

        Args:
            kind: what its time is spent on; None is what that of the stage before is.
        """

    def spent(self, kind: Kind, seconds: float) -> None:
        """Count seconds of the stages until now as time of another kind."""

    def update(self, done: int, **figures: str) -> None:
        """`done` units of the stage are done.

        Args:
            figures: shown as they are, `tokens_per_s="9,100"`. Where a line has no room for all, the last ones are left
                out.
        """

    def note(self, text: str) -> None:
        """Say one line that stays."""

    def log(self, text: str) -> None:
        """Say one line in a log; a terminal, whose live line says the same, leaves it out."""


class Silent:
    """No display."""

    def start(self, stage: str, *, total: int | None = None, unit: str = "", kind: Kind | None = None) -> None: ...
    def spent(self, kind: Kind, seconds: float) -> None: ...
    def update(self, done: int, **figures: str) -> None: ...
    def note(self, text: str) -> None: ...
    def log(self, text: str) -> None: ...


class _Stage:
    """A stage, and what is said of it."""

    def __init__(self, name: str, total: int | None, unit: str, pace: Pace) -> None:
        self.name, self.total, self._unit, self._pace = name, total, unit, pace
        self.done = 0
        self._figures: dict[str, str] = {}
        self.began = time.monotonic()
        pace.enter(self.began)

    def update(self, done: int, figures: dict[str, str]) -> None:
        self.done, self._figures = done, figures
        self._pace.reach(done, time.monotonic())

    def end(self) -> None:
        self._pace.leave(time.monotonic())

    def parts(self) -> list[str]:
        """How far the stage is, the most important first."""
        parts = []
        if self.total is not None:
            parts.append(f"{self._unit} {self.done}/{self.total}".strip())
        elif self._unit:
            parts.append(f"{self._unit} {self.done}")
        now = time.monotonic()
        left = None if self.total is None else self._pace.seconds_left(self.total, now)
        parts.append(clock(now - self.began) if left is None else f"{clock(left)} left")
        return [*parts, *(f"{name.replace('_per_', '/')} {value}" for name, value in self._figures.items())]


class _Display:
    """A display of one stage at a time, which knows on what the time was spent."""

    def __init__(self, console: Console) -> None:
        self.times = Times()
        self._console = console
        self._stage: _Stage | None = None
        self._paces: dict[str, Pace] = {}
        self._notes: deque[str] = deque()
        self._lock = threading.RLock()
        self._is_printing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def start(self, stage: str, *, total: int | None = None, unit: str = "", kind: Kind | None = None) -> None:
        self.times.begin(kind)
        if self._stage:
            self._stage.end()
        if kind == "start":
            # Workers that start again may be others, and go at another speed.
            self._paces.clear()
        self._stage = _Stage(stage, total, unit, self._paces.setdefault(stage, Pace()))

    def spent(self, kind: Kind, seconds: float) -> None:
        self.times.move(kind, seconds)

    def update(self, done: int, **figures: str) -> None:
        if self._stage:
            self._stage.update(done, figures)

    def note(self, text: str) -> None:
        with self._lock:
            self._notes.append(printable(text))
            # In this thread only a signal handler comes here while a note is printed. It may not print into the middle
            # of it: rich would print the first again. Its own is printed next.
            while self._notes and not self._is_printing:
                self._is_printing = True
                try:
                    while self._notes:
                        self._print(self._notes.popleft())
                finally:
                    self._is_printing = False

    def _print(self, text: str) -> None:
        raise NotImplementedError


class TerminalProgress(_Display):
    """A live line at the bottom of a terminal, and notes above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        spinner = Spinner("line" if console.options.ascii_only else "dots")
        self._live = Live(
            console=console,
            transient=True,
            refresh_per_second=8,
            # Above the live line goes what is written to this terminal, but not what goes to a pipe or a file.
            redirect_stdout=sys.stdout.isatty(),
            get_renderable=lambda: _Line(self._stage, spinner) if self._stage else "",
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def log(self, text: str) -> None: ...

    def _print(self, text: str) -> None:
        self._console.print(Text(text))


@dataclass(frozen=True)
class _Line:
    """A stage in one line of a terminal: its name, a bar, and as many of its parts as there is room for."""

    stage: _Stage
    spinner: Spinner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _terminal_width(console))
        stage = self.stage
        begin = f"{self.spinner.render(console.get_time())} {_cut(stage.name, width - 2)}"
        yield Text(begin, end="")
        room = width - len(begin)
        separator = ", "
        if stage.total is not None and room > (bar_width := width // 10):
            yield Text(" ", end="")
            bar = ProgressBar(total=stage.total, completed=stage.done, width=bar_width)
            # Without colours a bar is only as long as what is done.
            yield from Segment.adjust_line_length(list(console.render(bar, options)), bar_width)
            room -= 1 + bar_width
            separator = " "
        for part in stage.parts():
            room -= len(separator + part)
            if room < 0:
                break
            yield Text(separator + part, end="")
            separator = ", "


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(0, width - 3)]}..."[: max(0, width)]


def _terminal_width(console: Console) -> int:
    """Columns of the terminal itself, also where the variable `COLUMNS` has another number."""
    try:
        return os.get_terminal_size(console.file.fileno()).columns or console.width
    except (OSError, ValueError):  # not a terminal
        return console.width


class LineProgress(_Display):
    """A line when a stage begins, with its first figures, and then every few seconds."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._said = 0.0
        self._first: dict[str, float] = {}
        """When each stage had its first figures."""

    def start(self, stage: str, *, total: int | None = None, unit: str = "", kind: Kind | None = None) -> None:
        again = self._stage is not None and self._stage.name == stage
        super().start(stage, total=total, unit=unit, kind=kind)
        if kind == "start":
            self._first.clear()
        self._said = time.monotonic()
        if not again:
            self.note(stage)

    def update(self, done: int, **figures: str) -> None:
        super().update(done, **figures)
        if self._stage is None:
            return
        name, now = self._stage.name, time.monotonic()
        is_first = bool(figures) and name not in self._first
        if is_first:
            self._first[name] = now
        is_young = now - self._first.get(name, self._stage.began) < _SOON_S
        if is_first or now - self._said >= (_FIRST_INTERVAL_S if is_young else _INTERVAL_S):
            self._said = now
            self.note(", ".join([name, *self._stage.parts()]))

    def log(self, text: str) -> None:
        self.note(text)

    def _print(self, text: str) -> None:
        self._console.print(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", highlight=False, markup=False, soft_wrap=True
        )


def open_progress(console: Console) -> TerminalProgress | LineProgress:
    """The display that fits where the output goes; a context manager."""
    # Variables that ask for colours make a log a terminal, for rich.
    is_live = console.is_interactive and console.file.isatty()
    return TerminalProgress(console) if is_live else LineProgress(console)

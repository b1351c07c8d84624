"""The display while a stage works: a live line on a terminal, plain lines in a log file."""

import sys
import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

_LOG_WIDTH = 120

out = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, highlight=False)
err = Console(stderr=True, width=None if sys.stderr.isatty() else _LOG_WIDTH, highlight=False)


class Progress(Protocol):
    """Where a stage says how far it is."""

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        """Begin a stage of `total` units; None where the end is not known."""

    def update(self, done: int, **figures: str) -> None:
        """`done` units of the stage are done; figures are shown as they are: `tokens_per_s="9,100"`."""

    def note(self, text: str) -> None:
        """Say one line that stays."""

    def log(self, text: str) -> None:
        """Say one line in a log; a terminal, whose live line says the same, leaves it out."""


class Silent:
    """No display."""

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None: ...
    def update(self, done: int, **figures: str) -> None: ...
    def note(self, text: str) -> None: ...
    def log(self, text: str) -> None: ...


class _Stage:
    """The stage that is shown, and its rate since it began."""

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.began = time.monotonic()
        self.first: tuple[int, float] | None = None
        self.done = 0
        self.figures: dict[str, str] = {}

    def update(self, done: int, figures: dict[str, str]) -> None:
        now = time.monotonic()
        if self.first is None:
            # A resumed stage begins with units that this process did not do.
            self.first = (done, now)
        self.done, self.figures = done, figures

    def line(self) -> str:
        parts = [self.name]
        if self.total is not None:
            parts.append(f"{self.unit} {self.done}/{self.total}".strip())
        elif self.unit:
            parts.append(f"{self.unit} {self.done}")
        parts += [f"{name.replace('_per_', '/')} {value}" for name, value in self.figures.items()]
        left = self._seconds_left()
        parts.append(f"{clock(left)} left" if left is not None else clock(time.monotonic() - self.began))
        return " · ".join(parts)

    def _seconds_left(self) -> float | None:
        if self.total is None or self.first is None or self.done <= self.first[0]:
            return None
        per_unit = (time.monotonic() - self.first[1]) / (self.done - self.first[0])
        return per_unit * (self.total - self.done)


class TerminalProgress:
    """A live line at the bottom of a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: _Stage | None = None
        self._spinner = Spinner("dots")
        self._live = Live(console=console, refresh_per_second=8, transient=True, get_renderable=self._render)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        self._stage = _Stage(stage, total, unit)

    def update(self, done: int, **figures: str) -> None:
        if self._stage:
            self._stage.update(done, figures)

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def log(self, text: str) -> None: ...

    def _render(self) -> Spinner | Text:
        if self._stage is None:
            return Text("")
        line = Text(self._stage.line(), overflow="ellipsis", no_wrap=True)
        self._spinner.update(text=line)
        return self._spinner


class LineProgress:
    """One line a stage, and one every few seconds within it."""

    def __init__(self, console: Console, interval_s: float = 10) -> None:
        self._console = console
        self._interval_s = interval_s
        self._stage: _Stage | None = None
        self._said = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def start(self, stage: str, *, total: int | None = None, unit: str = "") -> None:
        again = self._stage is not None and self._stage.name == stage
        self._stage = _Stage(stage, total, unit)
        self._said = time.monotonic()
        if not again:
            self.note(stage)

    def update(self, done: int, **figures: str) -> None:
        if self._stage is None:
            return
        self._stage.update(done, figures)
        if time.monotonic() - self._said >= self._interval_s:
            self._said = time.monotonic()
            self.note(self._stage.line())

    def note(self, text: str) -> None:
        self._console.print(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", highlight=False, markup=False, soft_wrap=True
        )

    def log(self, text: str) -> None:
        self.note(text)


def open_progress(console: Console) -> TerminalProgress | LineProgress:
    """The display that fits where the output goes; a context manager."""
    return TerminalProgress(console) if console.is_terminal else LineProgress(console)


def clock(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"

"""The display while a stage works: a live line on a terminal, plain lines in a log file."""

import sys
import time
from types import TracebackType
from typing import Protocol, Self, TextIO

import rich.progress
from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from clm_dist.timing import Kind, Times, clock

_LOG_WIDTH = 120


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
        """`done` units of the stage are done; figures are shown as they are: `tokens_per_s="9,100"`."""

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


class _Stages:
    """The stage that is shown, as the one task of rich's progress, which also estimates the time left."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self.bar = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            _Line(),
            console=console,
            disable=not live,
            transient=True,
            refresh_per_second=8,
            # The time left comes from the last 1,000 updates, however long they took.
            speed_estimate_period=float("inf"),
            get_time=time.monotonic,
        )

    @property
    def stage(self) -> Task | None:
        return self.bar.tasks[-1] if self.bar.tasks else None

    def start(self, name: str, total: int | None, unit: str) -> None:
        for old in self.bar.task_ids:
            self.bar.remove_task(old)
        self.bar.add_task(name, total=total, unit=unit, figures={})

    def update(self, done: int, figures: dict[str, str]) -> None:
        if self.stage:
            self.bar.update(self.stage.id, completed=done, figures=figures)


class _Line(ProgressColumn):
    """A stage in one line."""

    def render(self, task: Task) -> Text:
        return Text(_line(task), overflow="ellipsis", no_wrap=True)


def _line(stage: Task) -> str:
    parts = [stage.description]
    unit = stage.fields["unit"]
    if stage.total is not None:
        parts.append(f"{unit} {stage.completed:.0f}/{stage.total:.0f}".strip())
    elif unit:
        parts.append(f"{unit} {stage.completed:.0f}")
    parts += [f"{name.replace('_per_', '/')} {value}" for name, value in stage.fields["figures"].items()]
    left = None if stage.total is None else stage.time_remaining
    parts.append(clock(stage.elapsed or 0) if left is None else f"{clock(left)} left")
    return " · ".join(parts)


class _Timed:
    """A display that knows on what the time was spent."""

    def __init__(self) -> None:
        self.times = Times()

    def spent(self, kind: Kind, seconds: float) -> None:
        self.times.move(kind, seconds)


class TerminalProgress(_Timed):
    """A live line at the bottom of a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._stages = _Stages(console, live=True)

    def __enter__(self) -> Self:
        self._stages.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stages.bar.stop()

    def start(self, stage: str, *, total: int | None = None, unit: str = "", kind: Kind | None = None) -> None:
        self.times.begin(kind)
        self._stages.start(stage, total, unit)

    def update(self, done: int, **figures: str) -> None:
        self._stages.update(done, figures)

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def log(self, text: str) -> None: ...


class LineProgress(_Timed):
    """One line a stage, and one every few seconds within it."""

    def __init__(self, console: Console, interval_s: float = 10) -> None:
        super().__init__()
        self._console = console
        self._interval_s = interval_s
        self._stages = _Stages(console, live=False)
        self._said = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def start(self, stage: str, *, total: int | None = None, unit: str = "", kind: Kind | None = None) -> None:
        self.times.begin(kind)
        again = self._stages.stage is not None and self._stages.stage.description == stage
        self._stages.start(stage, total, unit)
        self._said = time.monotonic()
        if not again:
            self.note(stage)

    def update(self, done: int, **figures: str) -> None:
        self._stages.update(done, figures)
        if self._stages.stage and time.monotonic() - self._said >= self._interval_s:
            self._said = time.monotonic()
            self.note(_line(self._stages.stage))

    def note(self, text: str) -> None:
        self._console.print(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", highlight=False, markup=False, soft_wrap=True
        )

    def log(self, text: str) -> None:
        self.note(text)


def open_progress(console: Console) -> TerminalProgress | LineProgress:
    """The display that fits where the output goes; a context manager."""
    return TerminalProgress(console) if console.is_terminal else LineProgress(console)

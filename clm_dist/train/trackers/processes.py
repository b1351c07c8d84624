"""The driver's side of trackers: a process for each, so that no fault of a tracker is one of the run.

A tracker may raise, hang, crash, take the memory of its libraries or stop what is written to a terminal; a process of
its own can be left. It gets the end of its standard input as the word that the run has ended.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from clm_dist.errors import ClmDistError, ConfigError, first_line
from clm_dist.files.atomic import make_dir, read_json
from clm_dist.files.run_dir import RunDir
from clm_dist.progress import Progress

_LIMIT_S = 30.0
_KILL_S = 5.0
"""After its limit a process ends by itself; it is killed where it does not."""


@contextlib.contextmanager
def tracked(
    trackers: Sequence[str], run: RunDir, progress: Progress, *, limit_s: float = _LIMIT_S
) -> Iterator[Callable[[], None]]:
    """Send the run's metrics to trackers meanwhile, and wait for them at the end. No fault of a tracker is raised.

    Yields a function to call now and then: it notes where a tracker shows the run, and why one was left.

    Args:
        limit_s: they may take this long after the end; after a KeyboardInterrupt nobody waits for them.
    """
    names = [name for name in dict.fromkeys(trackers) if name != "tensorboard"]
    processes = [_Process(name, run, progress.note, limit_s) for name in names]

    def look() -> None:
        for process in processes:
            process.look()

    waits = True
    try:
        yield look
    except KeyboardInterrupt:
        waits = False
        raise
    finally:
        for process in processes:
            process.close()
        if waits and processes:
            progress.start("Waiting for trackers", kind="end")
            deadline = time.monotonic() + limit_s + _KILL_S
            for process in processes:
                process.wait(deadline)


class _Process:
    """The process of one tracker."""

    def __init__(self, name: str, run: RunDir, note: Callable[[str], None], limit_s: float) -> None:
        self._name, self._run, self._note, self._limit_s = name, run, note, limit_s
        self._log = run.tracker_log(name)
        self._is_shown = self._has_ended = False
        self._process: subprocess.Popen[bytes] | None = None
        command = [sys.executable, "-P", "-m", "clm_dist.train.trackers.send", name, str(run.root), str(limit_s)]
        try:
            make_dir(run.trackers, private=True)
            with self._log.open("wb") as log:
                # In a session of its own, which a Ctrl-C does not reach.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
                )
        except (ClmDistError, OSError) as error:
            note(f"{name} fails ({first_line(error)}); the run does without it")

    def look(self) -> None:
        """Note what is new."""
        if self._process is None:
            return
        state = self._run.tracker_state(self._name)
        if not self._is_shown and state.exists():
            self._is_shown = True
            with contextlib.suppress(OSError, ConfigError):
                if url := read_json(state).get("url"):
                    self._note(f"{self._name}: {url}")
        if code := self._process.poll():
            self._process = None
            self._note(f"{self._name} {self._fault(code)}; the run does without it. See {self._log}")

    def close(self) -> None:
        """Tell the process that the run has ended."""
        self._has_ended = True
        if self._process and self._process.stdin:
            self._process.stdin.close()

    def wait(self, deadline: float) -> None:
        """Wait until the process has ended, at most until a time of the monotonic clock."""
        if self._process:
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a disk that does not answer
                    self._process.wait(_KILL_S)
        self.look()

    def _fault(self, code: int) -> str:
        if self._has_ended and code in (-signal.SIGALRM, -signal.SIGKILL):
            return f"did not take all figures within {self._limit_s:g} s after the end"
        if code < 0:
            return f"ended by signal {-code}"
        said = f"exit code {code}"
        with contextlib.suppress(OSError):
            *_, said = said, *filter(None, self._log.read_text(encoding="utf-8", errors="replace").splitlines())
        return f"fails ({said})"

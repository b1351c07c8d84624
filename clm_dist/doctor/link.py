"""How questions reach the probe of a node: in this process, or over the standard streams of one that was started."""

import collections
import json
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from clm_dist.doctor.bounded import begin
from clm_dist.doctor.probe import ANSWER, Probe

T = TypeVar("T")
_LAST_LINES = 3
_END_S = 1.0


class Link(Protocol):
    """The way to a node's probe, which answers one question after the other."""

    def ask(self, line: str) -> "Future[str]":
        """Send a question; what comes back waits for its answer."""

    def close(self) -> None:
        """End the probe."""


class Here:
    """The probe of this process's own node."""

    def __init__(self) -> None:
        self._probe = Probe()

    def ask(self, line: str) -> "Future[str]":
        return begin(self._probe.answer, line)

    def close(self) -> None:
        self._probe.close()


class Started:
    """The probe of a process that was started for it, such as one of srun.

    Args:
        command: runs `python -m clm_dist.doctor.probe` somewhere.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # A Ctrl-C is for this process, which ends the others.
            start_new_session=True,
        )
        self._waiting: collections.deque[Future[str]] = collections.deque()
        self._said: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        for read in (self._read, self._read_errors):
            threading.Thread(target=read, name="doctor-link", daemon=True).start()

    def ask(self, line: str) -> "Future[str]":
        future: Future[str] = Future()
        self._waiting.append(future)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            begin(self._fail_all)
        return future

    def close(self) -> None:
        try:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=_END_S)
        except (OSError, subprocess.TimeoutExpired):
            # TERM alone: srun passes its end on to the node.
            self._process.terminate()
            try:
                self._process.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER) and self._waiting:
                self._waiting.popleft().set_result(line.removeprefix(ANSWER))
            else:
                self._said.append(line.strip())
        self._fail_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._said.extend(line.strip() for line in self._process.stderr if line.strip())

    def _fail_all(self) -> None:
        """Tell all who wait that the probe has ended."""
        try:
            code: int | str = self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            code = "no code"
        # Its last words may be on their way.
        time.sleep(0.1)
        said = f": {' / '.join(self._said)}" if self._said else ""
        while self._waiting:
            self._waiting.popleft().set_exception(OSError(f"its probe ended with {code}{said}"))


class AskError(Exception):
    """A node did not answer, or not as it should."""


def question(ask: str, **arguments: Any) -> str:
    """The line of a question; see `Probe.answer`."""
    return json.dumps({"ask": ask, "with": {name: to_jsonable_python(value) for name, value in arguments.items()}})


def value_of(answer: "Future[str]", kind: Any, timeout_s: float) -> Any:
    """The value of an answer, as an object of a type. Raises AskError where there is none."""
    try:
        said = json.loads(answer.result(timeout=timeout_s))
    except TimeoutError:
        raise AskError(f"no answer within {timeout_s:.0f} s") from None
    except Exception as error:  # of whatever carries the lines
        raise AskError(str(error) or type(error).__name__) from None
    if "error" in said:
        raise AskError(said["error"])
    return TypeAdapter(kind).validate_python(said["value"])

"""Bounds in time: calls in threads that nobody has to wait for, and what is left of the time of a whole."""

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Deadline:
    """The moment at which a whole has to be done."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, at_most: float = float("inf")) -> float:
        """Seconds that are left, 0 or more."""
        return max(0.0, min(at_most, self._end - time.monotonic()))


def begin(function: Callable[..., T], *arguments: object) -> "Future[T]":
    """Call a function in a thread of its own, which does not keep this process from its end."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # handed to the thread that waits
            future.set_exception(error)

    threading.Thread(target=call, name=getattr(function, "__name__", "call"), daemon=True).start()
    return future


def output_of(command: Sequence[str], timeout_s: float) -> str:
    """What a program prints. Raises OSError where it is not there, or fails, or takes too long."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]} does not end within {timeout_s:g} s") from None
    if ended.returncode:
        said = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
        raise OSError(f"{command[0]} ends with {ended.returncode}: {said[-1] if said else 'it says nothing'}")
    return ended.stdout

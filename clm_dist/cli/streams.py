"""The standard streams of a command: its work does not end because nobody can read what it says."""

import contextlib
import os
import sys
from typing import Any, TextIO


def open_missing() -> None:
    """Open the null device for each standard stream that is closed: another file would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one. Processes that are started have it, too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  # it lasts as long as the process
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


class _Unfailing:
    """A text stream whose writes never fail. What a closed terminal or pipe or a full disk refuses is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class unfailing:  # noqa: N801  # a context manager reads as a verb
    """Lets writes to standard streams not fail for a time.

    Args:
        names: `stdout`, `stderr`.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._before: dict[str, TextIO] = {}

    def __enter__(self) -> None:
        for name in self._names:
            self._before[name] = getattr(sys, name)
            setattr(sys, name, _Unfailing(self._before[name]))

    def __exit__(self, *_: object) -> None:
        for name, stream in self._before.items():
            setattr(sys, name, stream)
            try:
                stream.flush()
            except (OSError, ValueError):
                # What is left in the buffer would make the interpreter end with another exit code.
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

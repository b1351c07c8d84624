"""SIGTERM and SIGUSR1 to a worker: the first asks for a checkpoint and the end of the run, the next is Ray's."""

import signal
from typing import Any

_NUMBERS = (signal.SIGTERM, signal.SIGUSR1)
_asked = False
_previous: dict[int, Any] = {}


def asked_to_stop() -> bool:
    """Whether a signal came."""
    return _asked


def install() -> None:
    """Take the signals. In the main thread only."""
    for number in _NUMBERS:
        _previous.setdefault(number, signal.signal(number, _ask))


def uninstall() -> None:
    """Give the signals back: Ray ends its workers by SIGTERM. In the main thread only."""
    while _previous:
        number, handler = _previous.popitem()
        signal.signal(number, handler)


def _ask(number: int, frame: Any) -> None:
    # Without a lock: a handler may interrupt itself.
    global _asked
    if _asked and callable(handler := _previous.get(number)):
        handler(number, frame)
    _asked = True

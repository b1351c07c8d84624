"""Signals that ask a command to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals of schedulers and service managers, and of a terminal that closes."""


@contextlib.contextmanager
def handling(numbers: Sequence[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call a function at these signals for a time. Only the main thread can; in others nothing is changed.

    SIGHUP stays ignored where it is: that is what nohup is for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)

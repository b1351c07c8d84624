"""A rank's voice: the records of its steps, what it wants of all, and how its saves ended."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from clm_dist.files.markers import TrainerState
from clm_dist.files.record_types import Record
from clm_dist.train.checkpointing.saver import Saved, Saver
from clm_dist.train.heartbeat import Heart
from clm_dist.train.messages import Message
from clm_dist.train.session import Session

_REPORT_INTERVAL_S = 1.0
_STOP_INTERVAL_S = 0.5


class Wish(NamedTuple):
    """What one rank asks of all."""

    stop: bool = False
    """A checkpoint, and the end of the run."""
    save: bool = False
    """A checkpoint now."""
    report: bool = False


@dataclass
class Reporter:
    """Gathers rank 0's records and sends them where every rank sends, with the save that has ended since."""

    session: Session
    saver: Saver
    heart: Heart
    state: TrainerState | None = None
    """State of the save that was begun last."""
    saved: Saved | None = None
    """The save that ended last and that the loop does not know of yet."""
    records: list[Record] = field(default_factory=list)
    sent: float = field(default_factory=time.monotonic)
    looked: float = 0.0
    began: float = field(default_factory=time.monotonic)
    """When the present phase did."""

    def add(self, record: Record) -> None:
        """Keep a record for the next message; rank 0's are sent."""
        if self.session.rank == 0:
            self.records.append(record)

    def phase(self, name: str, step: int) -> None:
        """Say what begins now. Collective."""
        self.heart.at(step, name[0].lower() + name[1:])
        self.began = time.monotonic()
        self.add({"kind": "phase", "step": step, "phase": name, "time": time.time()})
        self.send()

    def wishes(self) -> Wish:
        """What this rank asks for; one rank that asks decides for all."""
        now = time.monotonic()
        stop, save = self.session.asked_to_stop(), False
        if self.session.rank == 0 and now - self.looked >= _STOP_INTERVAL_S:
            self.looked = now
            stop, save = stop or self.session.run.stop.exists(), self.session.run.save.exists()
        report = self.saver.is_written() or (self.session.rank == 0 and now - self.sent >= _REPORT_INTERVAL_S)
        return Wish(stop, save, report)

    def send(self) -> None:
        """Collective."""
        self._report({})

    def send_evaluation(self, kind: Literal["eval", "verify"], step: int, epoch: float, micros: list[Any]) -> None:
        """Send what the phase that began last computed. Collective."""
        seconds = time.monotonic() - self.began
        rows = [(micro.index, micro.loss_sum, micro.num_tokens, micro.num_bytes) for micro in micros]
        self._report({"evaluation": {"kind": kind, "step": step, "epoch": epoch, "micros": rows, "seconds": seconds}})

    def conclude_save(self) -> Saved | None:
        """Send how the last save ended; None where there was none since. Collective."""
        self._report({})
        saved, self.saved = self.saved, None
        return saved

    def _report(self, message: Message) -> None:
        if saved := self.saver.take():
            self.saved = saved
            message["saved"] = saved
            if self.session.rank == 0 and self.state is not None:
                message["state"] = self.state
        message["host"] = socket.gethostname()
        message["records"] = self.records
        self.session.report(message)
        self.records = []
        self.sent = time.monotonic()


class StopCheck:
    """Whether a rank is asked to stop while all evaluate; the ranks ask each other about once a second.

    When that is due they must know alike, so it is in passes, and their number comes from what all have measured.
    """

    def __init__(self, reporter: Reporter, all_reduce: Callable[[list[float]], list[float]]) -> None:
        self._reporter, self._all_reduce = reporter, all_reduce
        self._due = 1
        self._began = 0.0

    def is_asked(self, num_done: int) -> bool:
        """Called after every pass, the number of which is the same on every rank. Collective.

        Args:
            num_done: passes of this evaluation.
        """
        if num_done == 1:
            self._due, self._began = 1, time.perf_counter()
        if num_done < self._due:
            return False
        # Whole numbers, so that their sum is the same in whatever order a backend adds.
        milliseconds = float(round(1000 * (time.perf_counter() - self._began)))
        asked, milliseconds, ranks = self._all_reduce([float(self._reporter.wishes().stop), milliseconds, 1.0])
        passes_a_second = int(1000 * ranks * (num_done - 1) // max(milliseconds, 1.0))
        # A first pass may be much slower than the others, or much faster.
        self._due = num_done + max(1, min(passes_a_second, num_done))
        return asked > 0

"""Detect workers that hang: each writes what it does, and the driver names the one that the others wait for.

A worker that stands still cannot say so. So a thread of each worker writes a beat, a small file in the run directory,
several times within `train.hang_timeout_s`: how far the worker has come, the collective that it waits in, its Python
stack. When no worker comes forward, the one at fault is the one whose beats have stopped as well (its process is
stopped, or its node is gone), else one that is in no collective while the others are.
"""

import contextlib
import json
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clm_dist.files.atomic import write_text

_MOST_INTERVAL_S = 5.0
_BEATS = 10
"""Beats within the timeout."""
_SHOWN_FRAMES = 8
_PACKAGE = Path(__file__).resolve().parent.parent
_START_S = 600.0
"""For a worker that has just started."""


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a worker."""

    rank: int
    pid: int
    host: str
    node: str
    """Id of Ray's node; empty without Ray."""
    count: int
    """Number of this beat."""
    progress: int
    """Rises with everything that the worker gets done."""
    is_starting: bool
    """Whether it has not begun with what a run does at its own pace."""
    step: int
    doing: str
    collective: str | None
    """The last collective, where torch knows it."""
    waiting: bool
    """Whether that is not over."""
    stack: tuple[str, ...]
    """Stack of the training thread, the innermost call last."""

    def describe(self) -> str:
        who = f"worker {self.rank} (pid {self.pid} on {self.host}) at step {self.step}, {self.doing}"
        collective = f"{'waiting in' if self.waiting else 'last collective'} {self.collective or 'unknown'}"
        return f"{who}, {collective}, in {' > '.join(self.stack) or 'unknown'}"


class Heart:
    """Writes this worker's beats until it is stopped. The thread that makes it is the one whose stack is told."""

    def __init__(self, directory: Path, rank: int, node: str, timeout_s: float | None) -> None:
        self._file = directory / f"rank-{rank:05d}.json"
        self._rank, self._node = rank, node
        self._interval = _interval(timeout_s)
        self._thread_id = threading.get_ident()
        self._step, self._doing, self._progress = 0, "starting", 0
        self._is_starting = True
        self._ended = threading.Event()
        directory.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)
        self._thread.start()

    def at(self, step: int, doing: str) -> None:
        """Say what begins now."""
        self._is_starting = False
        self._step, self._doing = step, doing
        self._progress += 1

    def goes_on(self, doing: str) -> None:
        """Say that what is waited for takes its time."""
        self.at(self._step, doing)

    def starts(self, doing: str) -> None:
        """Say what is done while the worker still starts, which may take as long as a start."""
        self._doing = doing
        self._progress += 1

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(self._interval if count else 0):
            count += 1
            collective, waiting = None, False
            # No part of torch's interface, and no reason to be taken for dead.
            with contextlib.suppress(Exception):
                collective, waiting = last_collective()
            # A beat that cannot be written is missed; the disk's fault shows elsewhere.
            with contextlib.suppress(Exception):
                beat = Beat(
                    rank=self._rank,
                    pid=os.getpid(),
                    host=socket.gethostname(),
                    node=self._node,
                    count=count,
                    progress=self._progress,
                    is_starting=self._is_starting,
                    step=self._step,
                    doing=self._doing,
                    collective=collective,
                    waiting=waiting,
                    stack=_stack(self._thread_id),
                )
                write_text(self._file, json.dumps(asdict(beat)))


def _interval(timeout_s: float | None) -> float:
    return _MOST_INTERVAL_S if timeout_s is None else min(_MOST_INTERVAL_S, timeout_s / _BEATS)


def _stack(thread_id: int) -> tuple[str, ...]:
    """The innermost frames of a thread, and all of this package: a model's layers lie deeper than a reader's place."""
    frame = sys._current_frames().get(thread_id)
    frames = traceback.extract_stack(frame) if frame else []
    own = [f for f in frames[:-_SHOWN_FRAMES] if Path(f.filename).is_relative_to(_PACKAGE)]
    return tuple(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in [*own, *frames[-_SHOWN_FRAMES:]])


def last_collective() -> tuple[str | None, bool]:
    """The last collective of this process, `gloo:all_reduce number 812`, and whether it is not over.

    From torch's flight recorder, which gloo and NCCL keep by themselves; (None, False) where there is none.
    """
    from torch._C import _distributed_c10d

    dump = getattr(_distributed_c10d, "_dump_fr_trace", None)
    if dump is None:
        return None, False
    entries = pickle.loads(dump(includeStackTraces=False)).get("entries", [])
    if not entries:
        return None, False
    last = entries[-1]
    return f"{last['profiling_name']} number {last['collective_seq_id']}", not last["retired"]


@dataclass(frozen=True)
class Hang:
    """Workers that stand still, and what to tell of them."""

    beats: tuple[Beat, ...]
    reason: str


class Watch:
    """The driver's eye on the beats.

    Args:
        directory: where the workers write them.
        timeout_s: within this time a worker that stands still is named; None never names one.
    """

    def __init__(self, directory: Path, timeout_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._timeout_s, self._clock = directory, timeout_s, clock
        self._interval = _interval(timeout_s)
        self._looked = -float("inf")
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._progressed = clock()

    def nodes(self) -> set[str]:
        """Nodes of Ray on which workers are."""
        return {beat.node for beat in self._beats.values()}

    def look(self) -> Hang | None:
        """The hang, if there is one; it is told once, and then what comes after it is watched."""
        now = self._clock()
        if now - self._looked < self._interval:
            return None
        self._looked = now
        beats = {beat.rank: beat for beat in read_beats(self._directory)}
        for rank, beat in beats.items():
            before = self._beats.get(rank)
            if before is None or (before.pid, before.count) != (beat.pid, beat.count):
                self._heard[rank] = now
            if before is None or (before.pid, before.progress) != (beat.pid, beat.progress):
                self._progressed = now
        self._beats = beats
        if not beats:
            self._progressed = now
        # A beat may be seen an interval late, and so may this; the third is for the way.
        if self._timeout_s is None or now - self._progressed < self._timeout_s - 3 * self._interval:
            return None
        # To import libraries and load a model takes its time, whatever a step takes.
        if any(beat.is_starting for beat in beats.values()) and now - self._progressed < _START_S:
            return None
        self._progressed = now
        silent = [beat for rank, beat in beats.items() if now - self._heard[rank] > 2 * self._interval]
        return Hang(*_culprits(list(beats.values()), silent, self._timeout_s))


def _culprits(beats: Sequence[Beat], silent: Sequence[Beat], timeout_s: float) -> tuple[tuple[Beat, ...], str]:
    if silent:
        found, why = silent, "gives no sign of life: its process is stopped, or its node is gone. Last seen"
    elif elsewhere := [beat for beat in beats if not beat.waiting]:
        found, why = elsewhere, "does not come forward"
    else:
        found, why = beats, "waits for the others, as all do; the network between them may be at fault"
    who = f"no progress within train.hang_timeout_s ({timeout_s:g} s): worker {found[0].rank}"
    return tuple(found), f"{who} {why}: {'; '.join(beat.describe() for beat in found[:4])}"


def read_beats(directory: Path) -> list[Beat]:
    """The beats that lie in a directory, by rank."""
    beats = []
    for path in sorted(directory.glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            content: dict[str, Any] = json.loads(path.read_text())
            beats.append(Beat(**content | {"stack": tuple(content["stack"])}))
    return beats

"""The records of a run: the lines of metrics.jsonl, one JSON object each, and the type of every kind.

A record is a dictionary as it stands in its line, so what is read is what was written. `kind` says which type it has,
and type checkers narrow a `Record` by it. `step` is the number of steps that were trained by then.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NotRequired, TypedDict

from pydantic_core import from_json

from clm_dist.errors import ConfigError
from clm_dist.files.atomic import whole_file, writing
from clm_dist.metrics import EvalFigures

logger = logging.getLogger(__name__)

_TAIL_BYTES = 2**16
# As they are written; a quote inside of a text has a backslash before it.
_START, _STEP = b'"kind": "start"', b'"kind": "step"'


class StartRecord(TypedDict):
    """Workers begin to train, for the first time or again."""

    kind: Literal["start"]
    step: int
    num_steps: int
    """Steps of the whole run."""
    time: float
    """Seconds since the epoch."""
    pid: int
    """Process of rank 0."""
    workers: int
    strategy: str
    device: str
    owes_evaluation: bool
    """Whether this step is still to be evaluated: the run was stopped while it was."""
    micro_size: NotRequired[int]
    """Blocks of a pass."""
    compiled: NotRequired[bool]
    """Whether passes are compiled."""
    note: NotRequired[str | None]
    """What is to be said of that."""
    hosts: NotRequired[list[str]]
    """Host of each rank."""


class StepRecord(TypedDict):
    """An optimizer step."""

    kind: Literal["step"]
    step: int
    epoch: float
    loss: float
    """Mean over the predicted tokens of the global batch, nats."""
    router_loss: NotRequired[float]
    """What a mixture of experts adds to that for its router, with `output_router_logits`; `loss` is without it."""
    lr: float
    grad_norm: float | None
    """2-norm before clipping; None where it is not finite, as fp16 may have it."""
    tokens: int
    seconds: float
    tokens_per_s: float
    mfu: float | None
    data_wait: float
    """Seconds of the step in which rank 0 waited for blocks."""
    blocks: int
    """Checksum of the blocks and their tokens."""


class EvalRecord(EvalFigures):
    """An evaluation of the eval split; `verify` is that of the written model."""

    kind: Literal["eval", "verify"]


class PhaseRecord(TypedDict):
    """The phase that begins now, for the display."""

    kind: Literal["phase"]
    step: int
    phase: str


class CheckpointRecord(TypedDict):
    """A checkpoint that was committed, or could not be."""

    kind: Literal["checkpoint"]
    step: int
    name: str
    error: NotRequired[str]
    """Why it is not committed."""
    bytes: NotRequired[int]
    seconds: NotRequired[float]
    """From the begin of the save until the last file was on its storage."""
    blocked: NotRequired[float]
    """Seconds of it in which training waited."""


class DamagedRecord(TypedDict):
    """A checkpoint that was passed over because it is not as it was written."""

    kind: Literal["damaged"]
    step: int
    error: str


class FailureRecord(TypedDict):
    """Workers died, and are started again."""

    kind: Literal["failure"]
    step: int
    worker: int
    """The first that failed; -1 for Ray's controller."""
    error: str
    time: float


class OutlierRecord(TypedDict):
    """A step whose loss or gradient is not finite, or whose loss stands out."""

    kind: Literal["nonfinite", "spike"]
    step: int
    loss: float | str
    """A string where it is not finite: JSON has no such number."""
    grad_norm: float | str
    blocks: list[int]
    """The first of the step's blocks, the worst first."""
    action: str
    """The action that was taken: the value of `train.on_nan` or `train.on_spike`."""
    limit: NotRequired[float]
    """The loss above which it stands out."""


class RollbackRecord(TypedDict):
    """The run went back to the weights of the step `to`, and skipped the steps up to `step`."""

    kind: Literal["rollback"]
    step: int
    to: int


class ExportRecord(TypedDict):
    """A model that was written before the end of the run."""

    kind: Literal["export"]
    step: int
    epoch: float
    path: str


Record = (
    StartRecord
    | StepRecord
    | EvalRecord
    | PhaseRecord
    | CheckpointRecord
    | DamagedRecord
    | FailureRecord
    | OutlierRecord
    | RollbackRecord
    | ExportRecord
)


def read_records(path: Path, *, last_steps: int | None = None) -> Iterator[Record]:
    """The records of a metrics file, one after the other; a last line that a crash cut short is skipped.

    Args:
        last_steps: only this many of the records of steps, the last ones, which come after all others. Those before
            them are not parsed, because a long run has hundreds of thousands.

    Raises:
        ConfigError: another line is not a record; the message names it.
    """
    steps: deque[tuple[int, bytes]] = deque(maxlen=last_steps)
    for number, line in _numbered_lines(path):
        if last_steps is not None and _STEP in line:
            steps.append((number, line))
        else:
            yield _parse_record(line, path, number)
    for number, line in steps:
        yield _parse_record(line, path, number)


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The whole lines of a file with their numbers, from 1; none where there is no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        yield from enumerate(_whole_lines(file), 1)


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that are whole: each ends with a newline, so what follows the last one is a fragment or nothing."""
    return (line for line in file if line.endswith(b"\n"))


class RecordReader:
    """Reads a metrics file while it grows."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._position = self._inode = 0
        if from_end and path.exists():
            with path.open("rb") as file:
                self._inode, self._position = os.fstat(file.fileno()).st_ino, _end_of_records(file)

    def new(self) -> tuple[list[Record], bool]:
        """The records since the last call, and whether the file was written anew.

        It is written anew when workers start again; then the records are that start and what follows it.

        Raises:
            ConfigError: a line is not a record.
            OSError: the file cannot be read.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return [], False
        with file:
            inode = os.fstat(file.fileno()).st_ino
            is_new = inode != self._inode
            if is_new:
                self._inode, self._position = inode, _last_start(file)
            file.seek(self._position)
            lines = list(_whole_lines(file))
        records = [_parse_record(line, self._path) for line in lines]
        self._position += sum(map(len, lines))
        return records, is_new


def _last_start(file: BinaryIO) -> int:
    """The place of the last record of a start; 0 where there is none."""
    found = place = 0
    for line in _whole_lines(file):
        if _START in line:
            found = place
        place += len(line)
    return found


def _parse_record(line: bytes, path: Path, number: int = 0) -> Record:
    """The record in a line. Raises ConfigError where it is none; `number` is that of the line, 0 if not known."""
    try:
        record = from_json(line)  # in a fifth of the time of json
    except ValueError:
        try:
            record = json.loads(line)  # which also reads a file name that is not UTF-8, as json writes it
        except ValueError:
            record = None
    if not isinstance(record, dict) or not record.keys() >= {"kind", "step"}:
        raise ConfigError(f"{path}{f':{number}' if number else ''}: not a record of a run; remove this line")
    return record  # type: ignore[return-value]  # clm-dist wrote it


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Add records; they are on the disk when this returns. Only the driver of a run may call it.

    They begin after the last line that is whole: what a full disk or a kill left of a record would be glued to them.
    """
    with writing(path), path.open("ab+") as file:
        end = _end_of_records(file)
        if fragment := file.seek(0, os.SEEK_END) - end:
            logger.warning("%s ends in the middle of a record, whose %d bytes are cut off", path, fragment)
            file.truncate(end)
        _write(file, records)


def _end_of_records(file: BinaryIO) -> int:
    """The end of the last line that is whole; 0 where there is none."""
    start = file.seek(0, os.SEEK_END)
    while start:
        end, start = start, max(0, start - _TAIL_BYTES)
        file.seek(start)
        if newline := file.read(end - start).rfind(b"\n") + 1:
            return start + newline
    return 0


def replace_records(path: Path, records: Iterable[Record], *, keep: Callable[[Record], bool] | None = None) -> None:
    """Write the file anew, in one step: a process that follows it sees the old records or the new ones.

    Args:
        keep: whether a record of the file stays, before `records`; raises ConfigError where a line is not a record.
    """
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        if keep is not None:
            file.writelines(line for number, line in _numbered_lines(path) if keep(_parse_record(line, path, number)))
        _write(file, records)


def _write(file: BinaryIO, records: Iterable[Record]) -> None:
    file.writelines(json.dumps(record).encode() + b"\n" for record in records)
    file.flush()
    os.fsync(file.fileno())

"""Reads and writes the records of a run, the lines of metrics.jsonl; `record_types.py` has the type of each kind."""

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pydantic_core import from_json

from clm_dist.errors import ConfigError
from clm_dist.files.atomic import whole_file, writing
from clm_dist.files.record_types import Record

logger = logging.getLogger(__name__)

_TAIL_BYTES = 2**16
# As they are written; a quote inside of a text has a backslash before it.
_START, _STEP = b'"kind": "start"', b'"kind": "step"'


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

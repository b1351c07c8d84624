"""The losses and speeds of a run as an event file of TensorBoard."""

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clm_dist.files.atomic import make_dir, writing
from clm_dist.files.record_types import Record


class EventFile:
    """An event file, to which records are added.

    Not a SummaryWriter of tensorboardX (2.6): its thread ends where the disk is full, and then its caller waits for
    room in its queue for ever.
    """

    def __init__(self, directory: Path) -> None:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event

        self._path = make_dir(directory) / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        with writing(self._path):
            self._writer = RecordWriter(str(self._path))
        self._write([Event(wall_time=time.time(), file_version="brain.Event:2")])

    def add(self, records: Sequence[Record]) -> None:
        """Write the numbers of steps and evaluations. Raises StorageError where the disk is full."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        events = []
        for record in records:
            if record["kind"] in ("step", "eval"):
                values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers_of(record).items()]
                events.append(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))
        self._write(events)

    def _write(self, events: Sequence[Any]) -> None:
        with writing(self._path):
            for event in events:
                self._writer.write(event.SerializeToString())
            self._writer.flush()


def numbers_of(record: Record) -> dict[str, float]:
    """The numbers of a step or an evaluation by tags as `step/loss`; none of other records."""
    if record["kind"] not in ("step", "eval"):
        return {}
    return {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if isinstance(value, int | float) and name not in ("step", "epoch")
    }

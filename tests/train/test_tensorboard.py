"""What TensorBoard reads of a run, and what happens where its file cannot be written."""

import contextlib
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from clm_dist.errors import StorageError
from clm_dist.train.tensorboard import EventFile
from tests.support.disks import mounted

STEP: Any = {"kind": "step", "step": 3, "epoch": 0.5, "loss": 1.5, "grad_norm": None, "tokens": 64}
EVAL: Any = {"kind": "eval", "step": 4, "epoch": 0.6, "loss": 1.25}
PHASE: Any = {"kind": "phase", "step": 4, "phase": "Training"}


def events_of(file: Path) -> list[Any]:
    """The events of a file, each between its length and checksums."""
    content, events = file.read_bytes(), []
    while content:
        (size,) = struct.unpack("Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return events


def test_steps_and_evaluations_are_scalars(tmp_path: Path) -> None:
    EventFile(tmp_path / "tensorboard").add([STEP, PHASE, EVAL])
    (file,) = (tmp_path / "tensorboard").glob("*tfevents*")
    version, *events = events_of(file)
    assert version.file_version == "brain.Event:2"
    scalars = [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in events]
    assert scalars == [(3, {"step/loss": 1.5, "step/tokens": 64}), (4, {"eval/loss": 1.25})]


def test_a_full_disk_is_told_and_not_waited_for(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        events = EventFile(disk / "tensorboard")
        with pytest.raises(StorageError, match=r"no space left while writing .*tfevents"):
            for _ in range(1000):
                events.add([STEP] * 10)
        with contextlib.suppress(OSError):  # what is left to write
            events._writer.close()

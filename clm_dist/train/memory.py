"""Memory of training: how much it takes, and a pass that does not fit, told from all else that may not."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from clm_dist.errors import first_line
from clm_dist.machine import read_machine

_READ_INTERVAL_S = 1.0
_STATM, _STATUS = Path("/proc/self/statm"), Path("/proc/self/status")
_CLEAR_REFS, _PEAK = Path("/proc/self/clear_refs"), "5"
"""What lets the system forget the most that a process had, see proc(5)."""


class PassTooLargeError(RuntimeError):
    """A pass of training does not fit into memory; one of fewer blocks may.

    Args:
        blocks: of the pass, where they were a try for `batch.micro_size: auto`.
    """

    def __init__(self, reason: str, blocks: int | None = None) -> None:
        super().__init__(reason, blocks)
        self.reason, self.blocks = reason, blocks

    def __str__(self) -> str:
        return self.reason


@contextlib.contextmanager
def of_a_pass() -> Iterator[None]:
    """Turns an error of too little memory inside into a PassTooLargeError."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise PassTooLargeError(first_line(error)) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host for tensors of its own, has too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


class Peak:
    """The most memory that a rank took since `reset`: of a GPU what tensors took, elsewhere what the process had."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Forget what was taken before; where the system does not let that, it counts on."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with contextlib.suppress(OSError):
                _CLEAR_REFS.write_text(_PEAK)

    def read(self) -> int | None:
        """Bytes; None where the system does not say."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with contextlib.suppress(OSError):
            if found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()):
                return int(found[1]) * 1024
        return None


def free_bytes(device: torch.device) -> int | None:
    """What this rank may take of a device in all, or of its machine, which the workers on it share.

    None where the system does not say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        return _resident_bytes() + read_machine().memory // int(os.environ["LOCAL_WORLD_SIZE"])
    except OSError:
        return None


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Gauge:
    """Reads how much memory a rank takes, about once a second.

    On a GPU this is the most that tensors took at once since it was last reset, elsewhere what the process has in
    memory now. No wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._due = 0.0

    def read(self) -> int | None:
        """Bytes; None where it is not due yet, or the system does not say."""
        now = time.monotonic()
        if now < self._due:
            return None
        self._due = now + _READ_INTERVAL_S
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            return _resident_bytes()
        except OSError:
            return None

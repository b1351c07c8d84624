"""Memory of training: how much it takes, and a pass that does not fit, told from all else that may not."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from clm_dist.errors import first_line

_READ_INTERVAL_S = 1.0
_STATM = Path("/proc/self/statm")


class PassTooLargeError(RuntimeError):
    """A pass of training does not fit into memory; one of fewer blocks may."""


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


class Gauge:
    """Reads how much memory a rank takes, about once a second.

    On a GPU this is the most that tensors took at once since the process began, elsewhere what the process has in
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
            return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return None

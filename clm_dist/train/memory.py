"""A pass of training that does not fit into memory, told from all else that may not."""

import contextlib
from collections.abc import Iterator

import torch

from clm_dist.errors import first_line


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

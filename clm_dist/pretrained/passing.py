"""Faults of a machine while something is loaded: the same call may work later, and what is loaded is not at fault."""

import errno

from clm_dist.errors import REFUSED, StorageError, first_line
from clm_dist.files.hub_errors import describe_full_disk


def raise_if_passing(error: Exception, what: str) -> None:
    """Raise StorageError for an error of a disk that may pass, and the error itself where memory is short."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        raise error
    if full := describe_full_disk(error):
        raise full from error
    if type(error) is OSError and error.errno not in (None, errno.EINVAL, errno.ENOENT, *REFUSED):
        raise StorageError(f"{what} cannot be read: {first_line(error)}; run the same command again") from error

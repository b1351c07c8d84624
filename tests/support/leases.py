"""Leases of processes that are not on this host."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from clm_dist.files.lease import Lease


@contextlib.contextmanager
def leased_elsewhere(directory: Path, *, touched: float = 1_600_000_060.0) -> Iterator[Path]:
    """The lease of a directory, which process 12 of another host made."""
    lease = Lease(directory).file
    holder = {"token": "1", "host": "deadnode", "pid": 12, "since": 1_600_000_000.0, "space": "a b", "started": "5"}
    lease.write_text(json.dumps(holder))
    os.utime(lease, (touched, touched))
    yield lease
    lease.unlink()

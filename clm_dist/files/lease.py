"""Lets one process at a time write a directory, over all hosts that see it.

`flock` is not used: NFS without lockd, Lustre without `-o flock` and some FUSE file systems refuse it, or grant it to
everybody. A lease is a file beside the directory that says which process holds it. Two operations are atomic on all of
these file systems: a file is created if it is not there, and renamed.

    .NAME.lease          the lease: host, process, since when; its holder touches it every few seconds
    .NAME.lease.TOKEN    the right to replace the lease that has this token; itself a lease

A holder on this host is looked up in /proc: when it has ended, the next process takes over at once. A holder on another
host has ended when it no longer touches its lease while another process watches it for half a minute. Clocks of hosts
are never compared.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from clm_dist.errors import TryAgainError
from clm_dist.files.atomic import writing

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_RENEW_S = 3.0
_STALE_S = 30.0
"""A lease of another host that was not touched for this long has no holder any more."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease."""

    token: str
    """Unique to each lease."""
    host: str
    pid: int
    since: float
    """Seconds since the epoch, by the clock of its host."""
    space: str | None
    """The boot and the namespace that its number is of; None if the system does not say."""
    started: str | None
    """When it was started, in ticks since the boot."""

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        if not self.host:
            return f"a process that has not written its name, since {since}"
        return f"process {self.pid} on {self.host}, since {since}"

    def runs(self) -> bool | None:
        """Whether the process runs; None if that cannot be seen from here."""
        if self.space is None or (self.host, self.space) != (socket.gethostname(), process_space()):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        started = _started(self.pid)
        # With hidepid, /proc does not show the processes of other users.
        return None if started is None else started == self.started


@dataclass(frozen=True)
class Held:
    """A lease that a process holds, or has left behind."""

    holder: Holder
    touched: float
    """When its holder touched it last, seconds since the epoch, by the clock of its file system."""


class HeldError(Exception):
    """Another process holds the lease, and runs."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(str(holder))
        self.holder = holder


@dataclass
class _Look:
    """What was seen of a lease of another host."""

    touched_ns: int
    at: float
    """When that was seen last, by this process's monotonic clock."""
    renewed: bool
    """Whether it was touched while this process watched."""
    still_s: float = 0.0
    """For how long this process has seen it untouched."""


class Lease:
    """The right to write a directory, which this process holds or waits for.

    Args:
        path: the directory; it need not exist, but its parent must.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.with_name(f".{path.name}.lease")
        self._token = ""
        self._looks: dict[str, _Look] = {}

    @contextlib.contextmanager
    def hold(self, *, timeout_s: float | None, on_wait: Callable[[Holder], None] | None = None) -> Iterator[None]:
        """Hold the lease; wait while another process that runs has it.

        Args:
            timeout_s: how long to wait; None is until the holder ends. It takes up to half a minute to know whether a
                holder on another host still runs, also where this is less.
            on_wait: called with each holder that is waited for; a line in the log is the default.

        Raises:
            HeldError: it is still held.
            ConfigError, StorageError: the directory cannot be written.
        """
        with writing(self.file):
            self._acquire(timeout_s, on_wait or self._log_wait)
        released = threading.Event()
        threading.Thread(target=self._renew, args=(self._token, released), name="lease", daemon=True).start()
        try:
            yield
        finally:
            released.set()
            self._release()

    def _acquire(self, timeout_s: float | None, on_wait: Callable[[Holder], None]) -> None:
        began, told = time.monotonic(), ""
        while (found := self._take(self.file)) is not None:
            holder, runs = found
            waited = time.monotonic() - began
            if runs and timeout_s is not None and waited >= timeout_s:
                raise HeldError(holder)
            # Who has just made its lease writes its name into it in a moment.
            if holder.token != told and (holder.host or waited > _RENEW_S):
                on_wait(holder)
                told = holder.token
            time.sleep(_POLL_S)

    def _take(self, file: Path) -> tuple[Holder, bool] | None:
        """Make a lease this process's own; else its holder, and whether it is known to run."""
        while not self._create(file):
            if (read := _read(file)) is None:
                continue
            holder, touched_ns = read
            runs = self._runs(holder, touched_ns)
            if runs is not False:
                return holder, bool(runs)
            # Two may have found it dead: who has the right to its token replaces it, unless it was replaced meanwhile.
            right = self._right(holder.token)
            if (other := self._take(right)) is not None:
                return other
            if _token_of(file) == holder.token:
                logger.info("%s was left by %s", file, holder)
                # Not there if this process stood still, and another has taken the right.
                with contextlib.suppress(FileNotFoundError):
                    right.replace(file)
                    return None
            right.unlink(missing_ok=True)
        return None

    def _create(self, file: Path) -> bool:
        """Create a lease of this process; false if there is one."""
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        inode = os.fstat(handle).st_ino
        token = secrets.token_hex(8)
        own = Holder(token, socket.gethostname(), os.getpid(), time.time(), process_space(), _started(os.getpid()))
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as opened:
                json.dump(asdict(own), opened)
        except OSError:
            # Unless it took so long that another has taken the empty lease for a dead one.
            with contextlib.suppress(OSError):
                if _token_of(file) == f"{inode}":
                    file.unlink()
            raise
        # It may have taken too long.
        if _token_of(file) != token:
            return False
        self._token = token
        return True

    def _runs(self, holder: Holder, touched_ns: int) -> bool | None:
        """Whether a holder runs; None as long as that is not known."""
        if (runs := holder.runs()) is not None:
            return runs
        now, look = time.monotonic(), self._looks.get(holder.token)
        if look is None or touched_ns != look.touched_ns:
            look = self._looks[holder.token] = _Look(touched_ns, now, renewed=look is not None)
        # A look that took long says nothing: storage that was away comes back for the holder, too, who touches it then.
        look.still_s += min(now - look.at, _RENEW_S)
        look.at = now
        return False if look.still_s > _STALE_S else look.renewed or None

    def _renew(self, token: str, released: threading.Event) -> None:
        """Touch the lease until it is released. End this process where it has it no more: two must not write."""
        while not released.wait(_RENEW_S):
            with contextlib.suppress(OSError):  # the storage may be away for a moment
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self.file)
                read = _read(self.file)
                if released.is_set() or (read is not None and read[0].token == token):
                    continue
                what = f"{read[0]} has taken it over" if read else "it was removed"
                logger.error(
                    "this process has lost %s: %s, perhaps because it or its storage stood still for more than %.0f s; "
                    "it ends, and the same command may work later",
                    *(self.file, what, _STALE_S),
                )
                os._exit(TryAgainError.exit_code)

    def _release(self) -> None:
        """Remove the lease, unless another has taken it over. That takes no space, which a full disk would not have."""
        with contextlib.suppress(OSError):  # who comes next finds that this process has ended
            if _token_of(self.file) == self._token:
                self.file.unlink()

    def _right(self, token: str) -> Path:
        return self.file.with_name(f"{self.file.name}.{token}")

    def _log_wait(self, holder: Holder) -> None:
        logger.warning("waiting for %s, which holds %s", holder, self.file)


def holder_of(path: Path) -> Held | None:
    """The lease of a directory, whose holder may have ended; None where there is no lease, or it cannot be read."""
    # A run may lie behind a link, or be named by one, or by a path that ends with a dot.
    for directory in dict.fromkeys((path.absolute(), path.resolve())):
        with contextlib.suppress(OSError):
            if (read := _read(Lease(directory).file)) is not None:
                return Held(read[0], read[1] / 1e9)
    return None


def _read(file: Path) -> tuple[Holder, int] | None:
    """The holder of a lease, and when it was touched; None if the lease is not there."""
    try:
        # NFS asks its server when a file is opened, and may answer from memory otherwise.
        with file.open("rb") as opened:
            text, status = opened.read(), os.fstat(opened.fileno())
    except OSError as error:
        # On NFS another may have replaced it between the open and the read.
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise
    try:
        return Holder(**json.loads(text)), status.st_mtime_ns
    except (ValueError, TypeError):
        # It is being written, or its writer was killed.
        return Holder(f"{status.st_ino}", "", 0, status.st_mtime, None, None), status.st_mtime_ns


def _token_of(file: Path) -> str | None:
    read = _read(file)
    return None if read is None else read[0].token


def process_space() -> str | None:
    """The boot and the namespace in which the number of this process is its own; None if the system does not say."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return None


def _started(pid: int) -> str | None:
    """When a process was started; empty if it is a zombie, None if that cannot be seen."""
    with contextlib.suppress(OSError):
        # The name of the program, in brackets, may have blanks.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        # A process is shown so from the end of its main thread on, while others may still write.
        return "" if fields[0] in "ZX" and int(fields[17]) <= 1 else fields[19]
    return None

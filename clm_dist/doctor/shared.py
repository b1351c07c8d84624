"""Storage that all nodes see: what one node writes, the others read; names change at once; one lease has one holder."""

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec

from clm_dist.doctor.bounded import begin
from clm_dist.doctor.finding import Finding, error, ok, on, unchecked
from clm_dist.doctor.need import Place
from clm_dist.errors import ClmDistError, TryAgainError, first_line
from clm_dist.files.lease import HeldError, Lease
from clm_dist.files.storage import reaching

_SEEN_S = 2.0
"""NFS shows a new name of another node late, where it has asked for that directory before."""
_RELEASE_S = 2.0
_POLL_S = 0.1
_WITH_BUCKETS = ("s3://", "s3a://", "gs://", "gcs://", "az://", "abfs://")


@dataclass(frozen=True)
class Seen:
    """What a node sees of the files that all nodes wrote."""

    missing: tuple[str, ...] = ()
    """Nodes whose files it does not see."""
    different: tuple[str, ...] = ()
    """Nodes whose files have other content here."""
    problem: str | None = None


@dataclass(frozen=True)
class Locked:
    """How a node fared when all wanted the same lease at once."""

    held: bool = False
    holder: str = ""
    """Who had it, where it was refused."""
    problem: str | None = None


@dataclass(frozen=True)
class Meeting:
    """A directory of this examination on storage that is to be shared; its first node removes it."""

    directory: str
    token: str

    def write(self, node: str) -> str | None:
        """Write this node's file, by another name at first. Return what hinders it."""
        try:
            root = Path(self.directory)
            root.mkdir(parents=True, exist_ok=True)
            unfinished = root / f".{node}"
            unfinished.write_text("unfinished")
            # As `files.atomic` does it: a reader sees the old content or the new.
            (root / node).write_text("old")
            unfinished.write_text(self._content(node))
            unfinished.replace(root / node)
        except OSError as problem:
            return problem.strerror or str(problem)
        return None

    def read(self, nodes: Sequence[str]) -> Seen:
        """Look for the files of all nodes, for a moment."""
        end = time.monotonic() + _SEEN_S
        while True:
            missing, different = [], []
            try:
                for node in nodes:
                    file = Path(self.directory) / node
                    if not file.exists():
                        missing.append(node)
                    elif file.read_text() != self._content(node):
                        different.append(node)
            except OSError as problem:
                return Seen(problem=problem.strerror or str(problem))
            if not (missing or different) or time.monotonic() > end:
                return Seen(tuple(missing), tuple(different))
            time.sleep(_POLL_S)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _content(self, node: str) -> str:
        return f"{self.token} {node}"


class LeaseTrial:
    """This node's try to get a lease that all nodes want at once; it keeps what it gets until `release`."""

    def __init__(self, directory: str) -> None:
        self._lease = Lease(Path(directory) / "lease")
        self._released = threading.Event()
        self.result: Locked | None = None
        """None until it is known."""
        self._ended = begin(self._try)

    def _try(self) -> None:
        try:
            with self._lease.hold(timeout_s=0, on_wait=lambda _: None):
                self.result = Locked(held=True)
                self._released.wait()
        except HeldError as refused:
            self.result = Locked(holder=refused.holder.host)
        except (ClmDistError, OSError) as problem:
            self.result = Locked(problem=first_line(problem))

    def release(self) -> None:
        """Give back what it got; wait a moment until that is done."""
        self._released.set()
        with contextlib.suppress(TimeoutError):
            self._ended.result(timeout=_RELEASE_S)


def meeting_at(directory: str) -> Meeting:
    """A meeting in a new directory below one that is there."""
    token = secrets.token_hex(8)
    return Meeting(f"{directory.rstrip('/')}/.clm-dist-doctor-{token}", token)


def write_object(url: str, token: str) -> tuple[str, bool] | None:
    """Write an object for all nodes to read; return what hinders it, and whether that may pass."""
    try:
        with reaching(url):
            files, path = fsspec.url_to_fs(url, use_listings_cache=False)
            # What has buckets needs no directories, and would make a bucket that nobody removes.
            if not url.startswith(_WITH_BUCKETS):
                files.makedirs(path, exist_ok=True)
            files.pipe_file(f"{path}/.clm-dist-doctor-{token}", token.encode())
    except ClmDistError as problem:
        return str(problem), isinstance(problem, TryAgainError)
    return None


def read_object(url: str, token: str) -> tuple[str, bool] | None:
    """Read that object; return what hinders it, and whether that may pass."""
    try:
        with reaching(url):
            files, path = fsspec.url_to_fs(url, use_listings_cache=False)
            content = files.cat_file(f"{path}/.clm-dist-doctor-{token}")
    except ClmDistError as problem:
        return str(problem), isinstance(problem, TryAgainError)
    return None if content == token.encode() else (f"{url}: an object has not the content that was written", False)


def remove_object(url: str, token: str) -> None:
    with contextlib.suppress(Exception):  # whatever a storage raises
        files, path = fsspec.url_to_fs(url)
        files.rm_file(f"{path}/.clm-dist-doctor-{token}")


_WHY = "workers read the job, the blocks and the checkpoints that another node wrote there"


def judge_existing(place: Place, existing: Mapping[str, str]) -> Iterator[Finding]:
    """The findings of a directory that one node has and another does not.

    Args:
        existing: on each node, the nearest directory that is there.
    """
    longest = max(existing.values(), key=len)
    for node, found in existing.items():
        if found != longest:
            message = f"{place.name} ({place.where}): {longest} is not there"
            mend = f"mount that storage on the node, or name a directory that all nodes have with {place.option}"
            yield from on(node, [error("shared storage", message, _WHY, mend)])


def judge_seen(place: Place, seen: Mapping[str, Seen]) -> Iterator[Finding]:
    """The findings of what nodes see of each other's files."""
    named = f"{place.name} ({place.where})"
    mend = f"name a directory that all nodes see with {place.option}"
    for node, found in seen.items():
        if found.problem:
            yield from on(node, [error("shared storage", f"{named}: {found.problem}", _WHY, mend)])
        if found.missing:
            message = f"{named}: what {', '.join(found.missing)} wrote is not there"
            yield from on(node, [error("shared storage", message, _WHY, mend)])
        if found.different:
            message = f"{named}: what {', '.join(found.different)} wrote has old or other content"
            lower = "lower how long this file system remembers what it has read (actimeo of NFS), or " + mend
            yield from on(node, [error("shared storage", message, _WHY, lower)])
    if seen and not any(found.problem or found.missing or found.different for found in seen.values()):
        yield ok("shared storage", f"{named}: {len(seen)} nodes read what each wrote and renamed")


def judge_locks(place: Place, locks: Mapping[str, Locked | None]) -> Iterator[Finding]:
    """The findings of a lease that all nodes wanted at once.

    Args:
        locks: None of a node that did not know in time whether it gets it.
    """
    named = f"{place.name} ({place.where})"
    for node, one in locks.items():
        if one is not None and one.problem:
            yield from on(node, [unchecked("shared storage", f"{named}: the lease ({one.problem})")])
    if any(one is not None and one.problem for one in locks.values()):
        return
    holders = [node for node, one in locks.items() if one is not None and one.held]
    if len(holders) > 1:
        yield error(
            "shared storage",
            f"{named}: {' and '.join(holders)} both got a lease that all nodes wanted at once",
            "leases keep two processes from writing a run or a store at the same time, and from damaging it",
            f"name a file system that makes and renames files atomically on all nodes with {place.option}",
        )
    elif late := [node for node, one in locks.items() if one is None]:
        yield unchecked("shared storage", f"{named}: the lease, because {', '.join(late)} did not get to know in time")
    elif len(holders) == 1:
        yield ok("shared storage", f"{named}: one of {len(locks)} nodes gets a lease that all want at once")
    else:
        yield unchecked("shared storage", f"{named}: the lease, because no node got it")


def judge_objects(place: Place, answers: Mapping[str, tuple[str, bool] | None]) -> Iterator[Finding]:
    """The findings of an object that the first node wrote and all read.

    Args:
        answers: of each node, what hinders it, and whether that may pass.
    """
    for node, problem in answers.items():
        if problem:
            said, passes = problem
            mend = f"see the message; {place.option} names the storage"
            yield from on(node, [error("shared storage", said, _WHY, mend, passes=passes)])
    if answers and not any(answers.values()):
        yield ok("shared storage", f"{place.name} ({place.where}): written, and read by {len(answers)} nodes")

"""The directories that a run writes to: what is free there, and how fast it is."""

import contextlib
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clm_dist.doctor.finding import Finding, error, note, ok, size, warning
from clm_dist.doctor.need import Place

_MIB = 2**20
_LITTLE = 64 * _MIB
"""With less, a run writes its small files and nothing else."""
_FEW_INODES = 1000
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_PROBE_BYTES, _PROBE_S = 64 * _MIB, 1.0
_CHUNK = 4 * _MIB


@dataclass(frozen=True)
class Disk:
    """A directory on one node."""

    existing: str
    """The directory itself, or the nearest above it that is there."""
    kind: str
    """Of its file system: ext4, nfs4, ..."""
    free: int
    """Bytes that this user may write."""
    free_inodes: int | None
    """None where the file system has no fixed number of them."""
    problem: str | None = None
    """Why nothing can be written there."""


def read_disk(path: str) -> Disk:
    """Look at a directory, which need not be there yet. It may take for ever where a server is away."""
    existing, problem = _nearest(Path(path))
    try:
        status = os.statvfs(existing)
    except OSError as error:
        return Disk(str(existing), "unknown", 0, None, error.strerror or str(error))
    return Disk(
        str(existing),
        _kind_of(existing),
        status.f_bavail * status.f_frsize,
        status.f_favail if status.f_files else None,
        problem or _problem_of(existing),
    )


def _nearest(path: Path) -> tuple[Path, str | None]:
    """The directory, or the nearest above it that can be seen; and what keeps it from being made, as far as seen."""
    problem = None
    for one in (path, *path.parents):
        try:
            if stat.S_ISDIR(one.stat().st_mode):
                return one, problem
            problem = f"{one} is not a directory"
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            problem = error.strerror
        except OSError:  # its server has lost it, for example
            return one, problem
    return Path("/"), problem


def _kind_of(path: Path) -> str:
    """The kind of a directory's file system, from the longest mount point above it."""
    real, longest, kind = str(path.resolve()), "", "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
            _, point, name, *_ = line.split()
            # Blanks are written so there.
            point = point.replace("\\040", " ")
            if len(point) >= len(longest) and (real + "/").startswith(point.rstrip("/") + "/"):
                longest, kind = point, name
    return kind


def _problem_of(directory: Path) -> str | None:
    """Why no file can be made in a directory; leaves nothing there."""
    probe = directory / f".clm-dist-doctor-{secrets.token_hex(4)}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as problem:
        return problem.strerror or str(problem)
    return None


def measure_write(directory: str) -> float:
    """Bytes a second that this process writes into a file there and has on the disk. Leaves nothing there.

    Raises OSError where it cannot be written.
    """
    data = secrets.token_bytes(_CHUNK)
    with tempfile.NamedTemporaryFile(prefix=".clm-dist-doctor-", dir=directory, buffering=0) as file:
        begun, written = time.monotonic(), 0
        while written < _PROBE_BYTES and time.monotonic() - begun < _PROBE_S:
            written += os.write(file.fileno(), data)
        os.fsync(file.fileno())
        return written / (time.monotonic() - begun)


def judge_disk(place: Place, found: Disk, needed: int | None) -> Iterator[Finding]:
    """The findings of a directory on one node.

    Args:
        needed: bytes that the run writes there; None where that is not known.
    """
    named = f"{place.name} ({place.where})"
    if found.problem:
        away = "" if found.existing == place.where else f", in {found.existing}, the nearest directory that is there"
        yield error(
            "disk",
            f"{named}: no file can be written{away}: {found.problem}",
            "a run that cannot write there is refused, or ends",
            f"make the directory writable for this user, or name another with {place.option}",
        )
        return
    free = f"{size(found.free)} free ({found.kind})"
    problems = [*_judge_room(place, named, free, found, needed)]
    if found.kind in _IN_MEMORY and place.is_shared:
        problems.append(
            note(
                "disk",
                f"{named} lies in memory ({found.kind})",
                "what a run writes there takes memory, and is gone when the machine starts again",
                f"name a directory on a disk with {place.option}",
            )
        )
    yield from problems
    if not problems:
        wanted = f", the run takes about {size(needed)}" if needed else ""
        yield ok("disk", f"{named}: {free}{wanted}")


def _judge_room(place: Place, named: str, free: str, found: Disk, needed: int | None) -> Iterator[Finding]:
    advice = f"free some space, or name another disk with {place.option}"
    if needed is not None and found.free < needed:
        yield error(
            "disk",
            f"{named}: {free}, and the run takes about {size(needed)}",
            "the run ends when the disk is full, with what its last checkpoint has",
            f"{advice}; fewer checkpoints (checkpoint.keep) take less",
            passes=True,
        )
    elif found.free < _LITTLE:
        what = f"{named}: {size(found.free)} free ({found.kind})"
        why = "a run ends when a disk that it writes to is full"
        is_full = found.free < _MIB
        yield error("disk", what, why, advice, passes=True) if is_full else warning("disk", what, why, advice)
    if found.free_inodes is not None and found.free_inodes < _FEW_INODES:
        yield warning(
            "disk",
            f"{named}: {found.free_inodes:,} more files can be made there",
            "a disk without inodes refuses new files though it has space",
            f"remove files that are not needed, or name another disk with {place.option}",
        )


def judge_write(
    place: Place, speeds: Sequence[float], checkpoint_bytes: int | None, signal_s: int
) -> Iterator[Finding]:
    """The findings of how fast checkpoints are written, by all nodes at once.

    Args:
        speeds: bytes a second of each node.
        checkpoint_bytes: size of a checkpoint; None where it is not known.
        signal_s: seconds in which a run that is preempted saves.
    """
    speed = sum(speeds)
    shown = f"{place.name} ({place.where}): {size(speed)}/s are written"
    shown += f" by {len(speeds)} nodes at once" if len(speeds) > 1 else ""
    if checkpoint_bytes is None:
        yield ok("disk", shown)
        return
    seconds = checkpoint_bytes / speed
    shown += f"; a checkpoint of about {size(checkpoint_bytes)} takes {seconds:,.1f} s"
    if seconds <= signal_s:
        yield ok("disk", shown)
        return
    yield warning(
        "disk",
        shown,
        f"a run that is told to stop has {signal_s} s to save (cluster.slurm.signal_s), and loses the steps since the "
        "last checkpoint where that is too short",
        f"set cluster.slurm.signal_s to {int(2 * seconds)} or more, or checkpoint.path to a faster disk",
    )

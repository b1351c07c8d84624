"""The nodes of a group meet on the storage that a run needs: they write, read, want the same lease, and measure."""

import secrets
import time
from collections.abc import Iterator, Mapping

from clm_dist.doctor.bounded import Deadline
from clm_dist.doctor.disk import Disk, judge_write
from clm_dist.doctor.finding import Finding, unchecked
from clm_dist.doctor.group import Group
from clm_dist.doctor.need import Need, Place
from clm_dist.doctor.shared import (
    Locked,
    Meeting,
    Seen,
    judge_existing,
    judge_locks,
    judge_objects,
    judge_seen,
    meeting_at,
)

_STORAGE_S, _OBJECT_S, _SPEED_S, _LEASE_S = 4.0, 4.0, 5.0, 5.0
_ASK_S = 2.0
_POLL_S = 0.2


class Meetings:
    """The examination of the places that every node must see; also of one node, which writes to them."""

    def __init__(self, group: Group, need: Need, disks: Mapping[str, Mapping[str, Disk]], deadline: Deadline) -> None:
        self._group, self._deadline = group, deadline
        self._disks = disks
        shared = [place for place in need.places if place.is_shared]
        self._objects = [place for place in shared if place.is_url]
        self._directories = [place for place in shared if not place.is_url]
        self._open: dict[Place, Meeting] = {}

    def files(self) -> Iterator[Finding]:
        """What each node writes in a directory, every other reads; then all begin to want one lease."""
        for place in self._directories:
            existing = {
                node: self._disks[node][place.where].existing
                for node in self._group.names
                if place.where in self._disks[node]
            }
            if len(existing) < 2:
                continue
            findings = list(judge_existing(place, existing))
            yield from findings
            disk = self._disks[next(iter(existing))][place.where]
            if findings or disk.problem:
                continue
            meeting = meeting_at(disk.existing)
            yield from self._meet(place, meeting)

    def _meet(self, place: Place, meeting: Meeting) -> Iterator[Finding]:
        self._open[place] = meeting
        written = self._group.ask_all(
            "write",
            str | None,
            self._deadline.left(_STORAGE_S),
            {n: {"node": n} for n in self._group.names},
            meeting=meeting,
        )
        nodes = [node for node, problem in written.items() if problem is None]
        seen = self._group.ask_all("read", Seen, self._deadline.left(_STORAGE_S), meeting=meeting, nodes=nodes)
        problems = {node: Seen(problem=problem) for node, problem in written.items() if problem is not None}
        findings = list(judge_seen(place, seen | problems))
        yield from findings
        if all(finding.severity == "ok" for finding in findings):
            self._group.ask_all("begin_lease", type(None), _ASK_S, meeting=meeting)
        else:
            self._close(place)

    def leases(self) -> Iterator[Finding]:
        """How the nodes fared with the leases; removes what `files` made."""
        end = Deadline(self._deadline.left(_LEASE_S))
        for place, meeting in list(self._open.items()):
            while True:
                locks = self._group.ask_all("lease", Locked | None, _ASK_S, meeting=meeting)
                if all(lock is not None for lock in locks.values()) or not end.left():
                    break
                time.sleep(_POLL_S)
            yield from judge_locks(place, locks)
            self._group.ask_all("end_lease", type(None), _ASK_S + 1, meeting=meeting)
            self._close(place)

    def _close(self, place: Place) -> None:
        meeting = self._open.pop(place)
        # Each, because what is not shared lies on every node.
        self._group.ask_all("remove", type(None), _ASK_S, meeting=meeting)

    def objects(self) -> Iterator[Finding]:
        """The first node writes an object, and all read it."""
        for place in self._objects:
            token = secrets.token_hex(8)
            first = self._group.names[:1]
            timeout_s = self._deadline.left(_OBJECT_S)
            arguments = {node: {"url": place.where, "token": token} for node in first}
            answers = self._group.ask_all("write_object", tuple[str, bool] | None, timeout_s, arguments)
            if answers and not any(answers.values()):
                timeout_s = self._deadline.left(_OBJECT_S)
                answers = self._group.ask_all(
                    "read_object", tuple[str, bool] | None, timeout_s, url=place.where, token=token
                )
                self._group.ask_all("remove_object", type(None), _ASK_S, arguments)
            yield from judge_objects(place, answers)

    def speed(self, checkpoint_bytes: int | None, signal_s: int) -> Iterator[Finding]:
        """How fast all nodes write where the checkpoints go."""
        place = next(
            (place for name in ("checkpoints", "runs") for place in self._directories if place.name == name), None
        )
        if place is None or any(one.name == "checkpoints" for one in self._objects):
            return
        room = {node: disks[place.where] for node, disks in self._disks.items() if place.where in disks}
        if not room or any(disk.problem for disk in room.values()):
            return
        if any(disk.free < 2**30 for disk in room.values()):
            yield unchecked("disk", f"how fast {place.where} is written: less than 1 GiB is free there")
            return
        directory = next(iter(room.values())).existing
        speeds = self._group.ask_all("write_speed", float, self._deadline.left(_SPEED_S), directory=directory)
        if speeds:
            yield from judge_write(place, list(speeds.values()), checkpoint_bytes, signal_s)

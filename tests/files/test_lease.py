"""One process at a time writes a directory, also where a host dies in the middle."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest

from clm_dist.errors import ConfigError, StorageError
from clm_dist.files import lease as leases
from clm_dist.files.lease import HeldError, Holder, Lease

_KILLED = """
import os, sys
from pathlib import Path
from typing import TextIO
from clm_dist.files.lease import Lease
with Lease(Path(sys.argv[1])).hold(timeout_s=0):
    os.kill(os.getpid(), 9)
"""
_STOOD_STILL = """
import sys, time
from pathlib import Path
from typing import TextIO
from clm_dist.files import lease
lease._RENEW_S = 0.1
with lease.Lease(Path(sys.argv[1])).hold(timeout_s=0):
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_RENEW_S", 0.1)
    monkeypatch.setattr(leases, "_STALE_S", 0.5)
    monkeypatch.setattr(leases, "_POLL_S", 0.02)


def write_lease(path: Path, token: str = "abc", **changes: object) -> Path:
    """A lease of another host."""
    fields = {"token": token, "host": "far", "pid": 7, "since": 1.8e9, "space": "other", "started": "1"}
    file = Lease(path).file
    file.write_text(json.dumps({**fields, **changes}))
    return file


@contextmanager
def renewed(file: Path) -> Iterator[None]:
    """A lease that its holder touches, by a clock that is a year ahead."""
    done = threading.Event()

    def touch() -> None:
        while not done.wait(0.05):
            at = time.time() + 3e7
            os.utime(file, (at, at))

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_lease_has_one_holder_and_leaves_nothing(path: Path) -> None:
    with (
        Lease(path).hold(timeout_s=0),
        pytest.raises(HeldError, match=rf"^process {os.getpid()} on .+, since 20\d\d-"),
        Lease(path).hold(timeout_s=0),
    ):
        pass
    with Lease(path).hold(timeout_s=0):
        pass
    assert list(path.parent.iterdir()) == []


def test_a_holder_of_this_host_that_was_killed_is_followed_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-c", _KILLED, str(path)], check=False)
    assert Lease(path).file.exists()
    monkeypatch.setattr(leases, "_POLL_S", None)  # no wait
    with Lease(path).hold(timeout_s=0):
        pass
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("started", ["1", ""])
def test_a_process_with_the_number_of_the_holder_is_not_the_holder(path: Path, started: str) -> None:
    write_lease(path, host=os.uname().nodename, space=leases.process_space(), pid=os.getpid(), started=started)
    with Lease(path).hold(timeout_s=0):
        assert json.loads(Lease(path).file.read_text())["started"] not in ("1", "")


def test_a_zombie_holds_nothing(path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(path)])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with Lease(path).hold(timeout_s=0):
        assert json.loads(Lease(path).file.read_text())["pid"] == os.getpid()
    process.wait()


def test_a_lease_of_another_host_is_taken_over_when_it_is_not_touched_any_more(path: Path, soon: None) -> None:
    file = write_lease(path)
    told: list[Holder] = []
    with Lease(path).hold(timeout_s=0, on_wait=told.append):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert [str(holder)[:16] for holder in told] == ["process 7 on far"]
    assert list(path.parent.iterdir()) == []


def test_a_lease_of_another_host_that_is_touched_is_held_whatever_the_clocks_say(path: Path, soon: None) -> None:
    file = write_lease(path)
    with renewed(file):
        with pytest.raises(HeldError, match="process 7 on far"), Lease(path).hold(timeout_s=0):
            pass
        with pytest.raises(HeldError), Lease(path).hold(timeout_s=1.5):
            pass


def test_a_holder_touches_its_lease(path: Path, soon: None) -> None:
    with Lease(path).hold(timeout_s=0):
        file = Lease(path).file
        os.utime(file, (1, 1))
        deadline = time.monotonic() + 60
        while file.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "a"}'])
def test_a_lease_whose_writer_was_killed_is_taken_over(path: Path, soon: None, text: str) -> None:
    Lease(path).file.write_text(text)
    with Lease(path).hold(timeout_s=0):
        pass
    assert list(path.parent.iterdir()) == []


def test_who_takes_over_may_be_killed_too(path: Path, soon: None) -> None:
    file = write_lease(path, "abc")
    right = file.with_name(f"{file.name}.abc")
    right.write_text(write_lease(path.with_name("other"), "def").read_text())
    with Lease(path).hold(timeout_s=0):
        pass
    assert [left.name for left in path.parent.iterdir()] == [".other.lease"]


@pytest.mark.parametrize("dead", ["here", "far"])
def test_of_many_that_find_a_dead_holder_one_takes_over_at_a_time(path: Path, soon: None, dead: str) -> None:
    here = {"host": os.uname().nodename, "space": leases.process_space(), "pid": os.getpid()}
    inside, most, done = 0, 0, 0
    guard = threading.Lock()

    def follow() -> None:
        nonlocal inside, most, done
        with Lease(path).hold(timeout_s=None, on_wait=lambda holder: None):
            with guard:
                inside, most = inside + 1, max(most, inside + 1)
            time.sleep(0.01)
            with guard:
                inside, done = inside - 1, done + 1

    for number in range(5):
        write_lease(path, f"abc{number}", **(here if dead == "here" else {}))
        threads = [threading.Thread(target=follow) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (most, done) == (1, 40)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_process_that_has_lost_its_lease_ends(path: Path, how: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _STOOD_STILL, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout and process.stdout.readline() == "holds\n"
        if how == "replaced":
            write_lease(path)
        else:
            Lease(path).file.unlink()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75
    assert ("process 7 on far, since" if how == "replaced" else "it was removed, perhaps") in said


def test_who_releases_leaves_the_lease_of_another(path: Path) -> None:
    with Lease(path).hold(timeout_s=0):
        file = write_lease(path)
    assert json.loads(file.read_text())["host"] == "far"
    assert list(path.parent.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_lease_of_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        # Another host has taken the empty lease for one that was left.
        Lease(path).file.unlink()
        write_lease(path)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(StorageError), Lease(path).hold(timeout_s=0):
        pass
    assert json.loads(Lease(path).file.read_text())["host"] == "far"


def test_a_lease_that_was_replaced_while_it_was_written_is_not_held(
    path: Path, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump, file = json.dump, Lease(path).file

    def replaced(value: object, opened: TextIO) -> None:
        monkeypatch.setattr(json, "dump", dump)
        dump(value, opened)
        file.unlink()
        write_lease(path)

    monkeypatch.setattr(json, "dump", replaced)
    waited_for: list[Holder] = []
    with Lease(path).hold(timeout_s=None, on_wait=waited_for.append):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert [holder.host for holder in waited_for] == ["far"]


def test_a_look_that_took_long_is_no_sign_of_death(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lease, holder = Lease(path), Holder("abc", "far", 7, 0.0, "other", "1")
    assert lease._runs(holder, 1) is None
    now[0] += 10 * leases._STALE_S  # the storage was away
    assert lease._runs(holder, 1) is None
    assert lease._runs(holder, 2) is True
    for _ in range(round(leases._STALE_S / leases._RENEW_S)):
        now[0] += leases._RENEW_S
        assert lease._runs(holder, 2) is True
    now[0] += leases._RENEW_S
    assert lease._runs(holder, 2) is False


def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"cannot write .*\.store\.lease"),
        Lease(tmp_path / "file" / "store").hold(timeout_s=0),
    ):
        pass

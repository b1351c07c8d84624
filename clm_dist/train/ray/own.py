"""A Ray of this process's own on this machine: closed to others, and gone with the process."""

import _thread
import contextlib
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import ray

from clm_dist.errors import ClmDistError, ConfigError, MendFirstError, NotReadyError, first_line
from clm_dist.files.atomic import make_dir, write_text
from clm_dist.files.lease import process_space
from clm_dist.train.ray import private

_LOGS = "CLM_DIST_RAY_LOGS"
"""Tells this process and its workers where Ray's logs will be when the run has failed."""
_PREFIX = "clm-dist-ray-"
_OWNER = "owner"
# Below it lie Ray's sockets, whose names the system limits to 107 characters.
_LONGEST = 19
_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
_REMOVE_TIMEOUT_S = 5.0
_WATCH_S = 2.0
_PRIVATE = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": None,
    # On the systems that it is meant for, Ray listens on 127.0.0.1 alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # One process for each CPU, which Ray Train's workers, with an environment of their own, never take.
    "RAY_prestart_worker_first_driver": "0",
}


@contextlib.contextmanager
def own_ray(logs: Path | None, **options: Any) -> Iterator[None]:
    """Start a Ray on this machine; it ends with this process, however that ends.

    It listens on 127.0.0.1 alone and asks for a token; token, sockets and logs lie in a directory that this user alone
    reads, and that is removed at the end. Signals to the group of this process do not reach its processes.

    Args:
        logs: directory that Ray's logs are copied to where the run fails for reasons that they may tell.
        options: of `ray.init`.

    Raises:
        NotReadyError: Ray does not start.
        StorageError: the disk of its directory is full.
        ConfigError: no directory is there for it.
    """
    directory = _make_directory()
    token = directory / "token"
    variables = {
        "RAY_AUTH_TOKEN_PATH": str(token),
        _LOGS: str(logs) if logs else "",
        # Ray Train's would be a process that looks for other nodes which are about to go.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
    try:
        write_text(directory / _OWNER, f"{os.getpid()} {process_space()}")
        write_text(token, secrets.token_hex(32), private=True)
        with _environment(variables):
            _start(directory, options)
            with parting(), _watched():
                yield
    except MendFirstError:
        raise
    except Exception:
        if logs:
            _keep_logs(directory, logs)
        raise
    finally:
        _remove(directory)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Interrupt this process where Ray ends: Ray would end it after a minute, without a word of ours."""
    done = threading.Event()

    def watch() -> None:
        was_lost = False
        while not done.wait(_WATCH_S):
            is_lost = private.lost_process() is not None
            # While a run trains, `WorkerWatch` sees it first.
            if is_lost and was_lost:
                _thread.interrupt_main(signal.SIGTERM)
                return
            was_lost = is_lost

    threading.Thread(target=watch, name="ray-watch", daemon=True).start()
    try:
        yield
    finally:
        done.set()


class RayEndedError(NotReadyError):
    """Ray, or a part of it that the run needs, has ended before the run."""

    ends_process = True

    @classmethod
    def because(cls, reason: str) -> Self:
        return cls(
            f"Ray, or a part of it, has ended before the run ({reason}). The committed checkpoints are whole; the same "
            f"command goes on from the last. Ray's logs lie in {log_dir()}"
        )


@contextlib.contextmanager
def parting() -> Iterator[None]:
    """Disconnect from Ray at the end. One that has ended would end this process if it were asked to.

    Raises:
        RayEndedError: it has ended; whatever else was raised is a consequence.
    """
    has_ended = False
    try:
        yield
    except RayEndedError:
        has_ended = True
        raise
    except BaseException as error:
        if (lost := private.lost_process()) is None:
            raise
        has_ended = True
        raise RayEndedError.because(f"its process {lost} is gone") from error
    finally:
        if has_ended:
            private.abandon()
        else:
            ray.shutdown(wait_for_processes=True)


def log_dir() -> str:
    """Where Ray's logs are, or will be when the run has failed."""
    return os.environ.get(_LOGS) or private.session_log_dir() or "Ray's session directory on the nodes"


def _start(directory: Path, options: Mapping[str, Any]) -> None:
    # Where the host's name stands for another address, or for none, gloo would listen there, or fail.
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    networks = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback)
    with (
        _environment(_PRIVATE | networks),
        private.on_loopback(),
        private.without_services(),
        private.in_a_session_of_its_own(),
    ):
        private.forget_token()
        try:
            ray.init(address="local", include_dashboard=False, _temp_dir=str(directory / "r"), **options)
        except Exception as error:  # whatever it is: Ray raises RuntimeError, KeyError, OSError, and plain Exception
            ray.shutdown()
            problem = f"{type(error).__name__}: {first_line(error)}"
            raise NotReadyError(
                f"Ray does not start on this machine ({problem}); run the same command again where it has memory and "
                f"time for it. Ray's logs lie in {log_dir()}"
            ) from error


@contextlib.contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of this process for a time; None unsets one."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _make_directory() -> Path:
    """A directory of this user's own with a short name; those that killed processes left are removed."""
    places = [os.environ.get(name, "") for name in ("RAY_TMPDIR", "TMPDIR")]
    problem = ""
    for place in [Path(place).absolute() for place in (*places, *_PLACES) if place]:
        if len(str(place)) > _LONGEST:
            continue
        for left in place.glob(f"{_PREFIX}*"):
            if _is_left(left):
                shutil.rmtree(left, ignore_errors=True)
        try:
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        except OSError as error:
            problem = problem or f"{place}: {error.strerror}"
    raise ConfigError(
        f"Ray has no directory for its files ({problem}); set TMPDIR to one that you may write to, of at most "
        f"{_LONGEST} characters"
    )


def _is_left(directory: Path) -> bool:
    """Whether the process whose directory this was is gone; false where that cannot be said, as from another host."""
    with contextlib.suppress(OSError, ValueError):
        pid, space = (directory / _OWNER).read_text().split(" ", 1)
        if directory.stat().st_uid == os.getuid() and space == process_space():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                return True
    return False


def _keep_logs(directory: Path, logs: Path) -> None:
    with contextlib.suppress(OSError, shutil.Error, ClmDistError):  # a full disk hides no error of the run
        shutil.rmtree(logs, ignore_errors=True)
        make_dir(logs, private=True)
        try:
            shutil.copytree((directory / "r" / "session_latest").resolve() / "logs", logs, dirs_exist_ok=True)
        finally:
            logs.chmod(0o700)


def _remove(directory: Path) -> None:
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    while directory.exists() and time.monotonic() < deadline:
        # Processes that are just ending may still write.
        shutil.rmtree(directory, ignore_errors=True)

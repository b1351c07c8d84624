"""The Ray that a run starts by itself: nobody else gets in, and nothing of it stays."""

import _thread
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate depends on it
import pytest
import ray

from clm_dist.config.job import ClusterConfig
from clm_dist.errors import ClmDistError, ConfigError, DataError, NotReadyError, RunError, StorageError
from clm_dist.files.lease import process_space
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import Store
from clm_dist.train.ray import own, private
from clm_dist.train.ray.cluster import Cluster, start_ray
from clm_dist.train.ray.own import RayEndedError, log_dir, own_ray
from clm_dist.train.ray.private import lost_process
from clm_dist.train.ray.trainer import build_trainer
from tests.conftest import MakeJob

_ASK = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1])
"""


def directory_of_ray() -> Path:
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    return next(parent for parent in session.parents if parent.name.startswith("clm-dist-ray-"))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_its_files_are_this_users_alone(cluster: Cluster) -> None:
    directory = directory_of_ray()
    assert (mode_of(directory), mode_of(directory / "token")) == (0o700, 0o600)
    assert str(directory) in log_dir()


def test_it_listens_on_this_machine_alone_and_apart_from_signals(cluster: Cluster) -> None:
    processes = psutil.Process().children(recursive=True)
    # Without its other children: tests before this one may have started some.
    session = {os.getsid(p.pid) for p in processes if p.name() in ("raylet", "gcs_server")}
    assert len(session) == 2
    assert os.getsid(0) not in session
    ours = [psutil.Process(), *(p for p in processes if p.is_running() and os.getsid(p.pid) in session)]
    listening = [c.laddr.ip for p in ours for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 5
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


def test_it_has_no_services_that_a_run_does_not_need(cluster: Cluster) -> None:
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    names = {file.name for file in logs.iterdir()}
    assert {"raylet.out", "gcs_server.out", "dashboard_agent.log"} <= names
    # Those of the dashboard and the autoscaler, and of the logs of other nodes.
    assert names.isdisjoint({"dashboard.log", "monitor.log", "log_monitor.log"})
    # At the port that is set otherwise, another Ray of this machine would wait.
    (port,) = re.findall(r"agent http address: 127\.0\.0\.1:(\d+)", (logs / "dashboard_agent.log").read_text())
    assert int(port) not in (0, ray._private.ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT)


@pytest.mark.parametrize(
    ("is_own", "workers", "alone"), [(True, 2, True), (True, (1, 2), False), (False, 2, False), (False, (1, 2), False)]
)
def test_what_looks_for_other_nodes_is_left_out_where_there_can_be_none(
    is_own: bool, workers: int | tuple[int, int], alone: bool, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job()
    job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"workers": workers})})
    trainer = build_trainer(job, RunDir(tmp_path), Store(tmp_path), Cluster(0, is_own=is_own), [])
    kinds = [type(one).__name__ for one in trainer._create_default_callbacks()]
    assert ("PlacementGroupCleanerCallback" not in kinds) is alone


def test_a_ray_that_is_started_is_this_processs_own_and_one_that_is_there_is_not(cluster: Cluster) -> None:
    assert cluster.is_own
    with start_ray(ClusterConfig()) as found:
        assert not found.is_own


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_a_client_without_the_token_is_refused(cluster: Cluster, token: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    address = ray.get_runtime_context().gcs_address
    asked = [sys.executable, "-c", _ASK, address]
    refused = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "AuthenticationError" in refused.stderr
    with_token = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": (directory_of_ray() / "token").read_text()}
    assert subprocess.run(asked, env=with_token, capture_output=True).returncode == 0


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_another_user_reads_nothing_of_it(cluster: Cluster) -> None:
    directory = directory_of_ray()
    for command in (["ls", str(directory)], ["cat", str(directory / "token")]):
        refused = subprocess.run(command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True)
        assert refused.returncode
        assert "Permission denied" in refused.stderr


def test_nothing_that_it_needs_is_missing_while_it_runs(cluster: Cluster) -> None:
    assert lost_process() is None


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A Ray that does not start: what it would be started with, and the place of its directories."""
    asked: list[dict[str, Any]] = []

    def start(**options: Any) -> None:
        asked.append(options | {name: os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME")})
        (Path(options["_temp_dir"]) / "session_latest" / "logs").mkdir(parents=True)
        (Path(options["_temp_dir"]) / "session_latest" / "logs" / "raylet.err").write_text("why")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", lambda **_: None)
    monkeypatch.setattr(own, "_LONGEST", 1000)
    monkeypatch.setattr(private, "forget_token", lambda: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another Ray")
    return asked


def left(place: Path) -> list[str]:
    return [path.name for path in place.glob("clm-dist-ray-*")]


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (RunError("r"), True),
        (NotReadyError("n"), True),
        (KeyboardInterrupt(), False),
        (DataError("d"), False),
        (None, False),
    ],
)
def test_its_logs_are_kept_where_they_may_tell_why_a_run_failed(
    no_ray: list[dict[str, Any]], tmp_path: Path, error: BaseException | None, kept: bool
) -> None:
    before = dict(os.environ)
    logs = tmp_path / "run" / "ray-logs"
    try:
        with own_ray(logs):
            assert len(left(tmp_path)) == 1
            assert log_dir() == str(logs)
            if error:
                raise error
    except (ClmDistError, KeyboardInterrupt):
        pass
    assert (logs / "raylet.err").exists() == kept
    assert left(tmp_path) == []
    assert dict(os.environ) == before
    assert (no_ray[0]["RAY_AUTH_TOKEN"], no_ray[0]["GLOO_SOCKET_IFNAME"]) == (None, "lo")


@pytest.mark.parametrize("error", [Exception("The node timed out"), KeyError("getpwuid(): uid not found: 1234")])
def test_a_ray_that_does_not_start_is_a_reason_to_try_again(
    no_ray: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(NotReadyError, match="Ray does not start on this machine") as said, own_ray(None):
        pass
    assert str(error).strip("'") in str(said.value)
    assert left(tmp_path) == []


def test_whatever_is_raised_after_ray_has_ended_is_a_consequence(
    no_ray: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned: list[bool] = []
    monkeypatch.setattr(private, "lost_process", lambda: "raylet")
    monkeypatch.setattr(private, "abandon", lambda: abandoned.append(True))
    monkeypatch.setattr(ray, "shutdown", lambda **_: pytest.fail("it would end this process"))
    with pytest.raises(RayEndedError, match=r"\(its process raylet is gone\)"), own_ray(tmp_path / "logs"):
        raise KeyboardInterrupt
    assert abandoned == [True]
    assert (tmp_path / "logs" / "raylet.err").exists()


def test_a_process_that_waits_is_interrupted_where_ray_ends(
    no_ray: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = threading.Event()
    monkeypatch.setattr(own, "_WATCH_S", 0.01)
    monkeypatch.setattr(_thread, "interrupt_main", lambda number: interrupted.set())
    with own_ray(None):
        assert not interrupted.wait(0.1)
        with monkeypatch.context() as lost:
            lost.setattr(private, "lost_process", lambda: "raylet")
            assert interrupted.wait(60)


def test_a_full_disk_at_the_start_is_a_reason_to_try_again(
    no_ray: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, **_: bool) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(own, "write_text", full)
    with pytest.raises(StorageError), own_ray(None):
        pass
    assert left(tmp_path) == []


def test_what_a_killed_process_left_is_removed(no_ray: list[dict[str, Any]], tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = process_space()
    for name, owner in {
        "gone": f"{gone.pid} {here}",
        "alive": f"{os.getpid()} {here}",
        "elsewhere": f"{gone.pid} another-boot {str(here).split(' ', 1)[1]}",
        "cut": "",
    }.items():
        (tmp_path / f"clm-dist-ray-{name}").mkdir()
        (tmp_path / f"clm-dist-ray-{name}" / "owner").write_text(owner)
    with own_ray(None):
        pass
    assert sorted(left(tmp_path)) == ["clm-dist-ray-alive", "clm-dist-ray-cut", "clm-dist-ray-elsewhere"]


def test_names_of_sockets_are_short_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("d" * 60)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(own, "_PLACES", ("/tmp",))
    directory = own._make_directory()
    try:
        assert directory.parent == Path("/tmp")
        # As long as Ray's names are at most.
        name = directory / "r" / "session_2026-11-28_08-38-03_321718_4194304" / "sockets" / "plasma_store"
        name.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(name))
    finally:
        own._remove(directory)
    longest = "/" + "t" * (own._LONGEST - 1) + str(name).removeprefix("/tmp")
    assert len(longest) <= 107


_END = """
import os, signal, sys, time
from pathlib import Path
from clm_dist.errors import NotReadyError
from clm_dist.signals import STOPS, handling
from clm_dist.train.ray import private
from clm_dist.train.ray.own import own_ray

def stop(number, frame):
    raise KeyboardInterrupt

try:
    with handling(STOPS, stop), own_ray(Path(sys.argv[1])):
        (info,) = private.ray._private.worker._global_node.all_processes["gcs_server"]
        os.kill(info.process.pid, signal.SIGKILL)
        time.sleep(50)
except NotReadyError as error:
    print(error, flush=True)
    os._exit(error.exit_code)
"""


@pytest.mark.long
def test_a_ray_that_ends_while_nothing_is_asked_of_it_is_seen(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", _END, str(tmp_path / "logs")], capture_output=True, text=True)
    assert ended.returncode == 75, ended.stderr
    assert "Ray, or a part of it, has ended before the run (its process gcs_server is gone)" in ended.stdout
    assert (tmp_path / "logs" / "gcs_server.out").exists()


def test_without_any_place_it_is_said_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(own, "_PLACES", ("/proc",))
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with pytest.raises(ConfigError, match=r"\(/nowhere: No such file or directory\); set TMPDIR to one that you may"):
        own._make_directory()

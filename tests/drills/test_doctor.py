"""`clm-dist doctor` in a job of a real Slurm cluster, and on the nodes of a Ray, each with a fault of its own.

A fault of one node is made in its namespaces: a disk, a route or a directory of Python that the others do not have. The
clock that is off is that of Python on that node, not the system's, which all nodes share.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.drills.nodes import some_nodes
from tests.drills.slurm_cluster import PROGRAM, Slurm, a_cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
# With time for a machine on which other tests run.
DOCTOR = [sys.executable, "-m", "clm_dist", "doctor", "--json", "--runs", "runs", "--store", "store", "--timeout=60"]
_CLOCK = "import time\n_now = time.time\ntime.time = lambda: _now() + 3600\n"


@dataclass(frozen=True)
class Doctor:
    """What an examination said."""

    code: int
    report: dict[str, Any]

    def of(self, severity: str, *, subject: str | None = None) -> list[tuple[list[str], str]]:
        """Nodes and words of the findings of a severity."""
        return [
            (finding["nodes"], finding["what"])
            for finding in self.report["findings"]
            if finding["severity"] == severity and subject in (None, finding["subject"])
        ]

    def has(self, severity: str, words: str, *nodes: str) -> bool:
        return any(words in what and found == list(nodes) for found, what in self.of(severity))


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if not PROGRAM.exists():
        pytest.skip("../shared/slurm (a Slurm cluster on one machine) is not here; it is not part of the repository")
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster on one machine needs root")
    with a_cluster(2) as cluster:
        yield cluster


def examine(slurm: Slurm, *arguments: str, nodes: int = 2, before: str = ":", **environment: str) -> Doctor:
    """What is found in a job of some nodes.

    Args:
        before: a command of the shell that runs first, in the job.
    """
    doctor = [*DOCTOR, *arguments]
    shell = ["bash", "-c", f'{before} >&2; exec "$@"', "doctor"]
    command = ["salloc", "--quiet", "--immediate=30", f"--nodes={nodes}", "--cpus-per-task=2", *shell, *doctor]
    clean = {name: value for name, value in slurm.environment.items() if not name.startswith(("GLOO", "NCCL"))}
    ended = subprocess.run(
        command, env=clean | environment, cwd=slurm.directory, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.startswith("{"), ended.stderr
    return Doctor(ended.returncode, json.loads(ended.stdout))


@contextlib.contextmanager
def on_node(slurm: Slurm, node: str, begin: str, end: str) -> Iterator[None]:
    """Run a line of shell on a node, outside of any job, and another at the end."""
    slurm.call("exec", node, "sh", "-c", begin)
    try:
        yield
    finally:
        slurm.call("exec", node, "sh", "-c", end)


@contextlib.contextmanager
def python_of(slurm: Slurm, node: str, files: dict[str, str]) -> Iterator[str]:
    """A directory for PYTHONPATH that has files on one node, and nothing on the others."""
    empty, full = slurm.directory / "python", slurm.directory / "python of one node"
    empty.mkdir(exist_ok=True)
    for name, text in files.items():
        (full / name).parent.mkdir(parents=True, exist_ok=True)
        (full / name).write_text(text)
    with on_node(slurm, node, f'mount --bind "{full}" "{empty}"', f'umount "{empty}"'):
        yield str(empty)


def test_a_job_whose_nodes_are_as_they_should_be(slurm: Slurm) -> None:
    found = examine(slurm)
    assert (found.code, found.of("error"), found.of("unchecked")) == (0, [], [])
    assert found.report["nodes"] == ["node1", "node2"]
    assert [facts["machine"]["host"] for facts in found.report["facts"].values()] == ["node1", "node2"]
    assert found.has("ok", "the same on all 2 nodes")
    assert found.has("ok", "2 connections between 2 nodes, each at three ports")
    assert any("in a stream of TCP (measured 2 ways)" in what for _, what in found.of("ok"))
    assert any("gloo sums over 2 nodes" in what for _, what in found.of("ok"))
    assert len(found.of("ok", subject="shared storage")) == 4
    # On these nodes it stands for 127.0.1.1, and the script of a job names the interface.
    assert found.has("note", "the own name of the host stands for 127.0.1.1")
    assert not (slurm.directory / "runs").exists()


def test_a_job_of_one_node_is_examined_there_and_not_on_the_login_node(slurm: Slurm) -> None:
    found = examine(slurm, nodes=1)
    assert (found.code, found.of("error")) == (0, [])
    (facts,) = found.report["facts"].values()
    assert facts["machine"]["host"] == "node1"


def test_an_interface_that_no_node_has(slurm: Slurm) -> None:
    found = examine(slurm, GLOO_SOCKET_IFNAME="ib9")
    assert found.code == 2
    assert found.has("error", "GLOO_SOCKET_IFNAME=ib9: such an interface is not up here")
    # What a run would have met.
    assert found.has("error", "Unable to find address for: ib9")


def test_an_interface_that_one_node_lacks(slurm: Slurm) -> None:
    make = "ip link add ib0 type veth peer name ib0p && ip addr add 10.99.0.1/24 dev ib0"
    up = "ip link set ib0p up && ip link set ib0 up"
    with on_node(slurm, "node1", f"{make} && {up}", "ip link del ib0"):
        found = examine(slurm, NCCL_SOCKET_IFNAME="ib0")
    assert found.code == 2
    assert found.has("error", "NCCL_SOCKET_IFNAME=ib0: such an interface is not up here", "node2")


def test_ports_that_a_firewall_closes(slurm: Slurm) -> None:
    """Answers from these ports are dropped on their node, as a firewall on it would do it."""
    rule = "pref 10 ipproto tcp sport 10002-19999 blackhole"
    with on_node(slurm, "node2", f"ip rule add {rule}", "ip rule del pref 10"):
        found = examine(slurm)
    assert found.code == 2
    ((nodes, what),) = found.of("error")
    assert nodes == ["node1"]
    assert what.startswith("port 1")
    assert "of node2 (10.213.79.12) cannot be reached: no answer within 2 s" in what


def test_a_node_that_no_other_reaches(slurm: Slurm) -> None:
    """Slurm's own connections, which go to the controller, are there."""
    with on_node(slurm, "node2", "ip route add blackhole 10.213.79.11", "ip route del blackhole 10.213.79.11"):
        found = examine(slurm)
    assert found.code == 2
    assert any("node2 (10.213.79.12) cannot be reached at any of the ports" in what for _, what in found.of("error"))
    assert any("an all-reduce" in what for _, what in found.of("unchecked"))


def test_a_full_disk_of_one_node(slurm: Slurm) -> None:
    small = slurm.directory / "small"
    small.mkdir()
    full = f'mount -t tmpfs -o size=1m tmpfs "{small}" && head -c 1044480 /dev/zero >"{small}/filling"'
    with on_node(slurm, "node2", full, f'umount "{small}"'):
        found = examine(slurm, TMPDIR=str(small))
    assert found.code == 75
    ((nodes, what),) = found.of("error")
    assert (nodes, "KiB free (tmpfs)" in what) == (["node2"], True)


def test_a_directory_that_nodes_do_not_share(slurm: Slurm) -> None:
    found = examine(slurm, "--runs", "/tmp/runs")
    assert found.code == 2
    assert found.has("error", "runs (/tmp/runs): what node2 wrote is not there", "node1")
    assert found.has("error", "runs (/tmp/runs): what node1 wrote is not there", "node2")
    assert not slurm.leavings()


def test_storage_that_one_node_has_not_mounted(slurm: Slurm) -> None:
    disk = slurm.directory / "mounted"
    (disk / "runs").mkdir(parents=True)
    with on_node(slurm, "node2", f'mount -t tmpfs tmpfs "{disk}"', f'umount "{disk}"'):
        found = examine(slurm, "--runs", str(disk / "runs"))
    assert found.code == 2
    assert found.has("error", f"{disk / 'runs'} is not there", "node2")


def test_another_version_on_one_node(slurm: Slurm) -> None:
    shadow = {"numpy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n"}
    with python_of(slurm, "node2", shadow) as path:
        found = examine(slurm, PYTHONPATH=path)
    assert found.code == 0
    assert any(nodes == ["node2"] and what.startswith("numpy is 1.0 here, and") for nodes, what in found.of("warning"))


def test_a_clock_that_is_an_hour_off(slurm: Slurm) -> None:
    with python_of(slurm, "node2", {"sitecustomize.py": _CLOCK}) as path:
        found = examine(slurm, PYTHONPATH=path)
    ((nodes, what),) = found.of("warning", subject="clock")
    assert nodes == ["node2"]
    assert what.startswith("its clock is 3,600.0")
    assert "ahead of that of node1 (give or take" in what


def test_a_node_on_which_clm_dist_does_not_start(slurm: Slurm) -> None:
    with python_of(slurm, "node2", {"clm_dist/__init__.py": ""}) as path:
        found = examine(slurm, PYTHONPATH=path, PYTHONSAFEPATH="1")
    assert found.code == 75
    ((nodes, what),) = found.of("error")
    assert nodes == ["node2"]
    assert "clm_dist" in what
    # The other is examined.
    assert list(found.report["facts"]) == ["node1"]


def test_a_node_whose_network_is_away(slurm: Slurm) -> None:
    """Slurm does not know of it yet when the examination begins."""
    fault = f"'{PROGRAM}' fault node2 link"
    try:
        found = examine(slurm, before=fault)
    finally:
        slurm.call("heal", "node2")
    assert found.code == 75
    assert [nodes for nodes, _ in found.of("error")] == [["node2"]]
    assert list(found.report["facts"]) == ["node1"]


def test_the_nodes_of_a_ray(tmp_path: Path) -> None:
    with some_nodes() as nodes:
        nodes.add()
        environment = os.environ | {"RAY_ADDRESS": nodes.address}
        ended = subprocess.run(DOCTOR, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    found = Doctor(ended.returncode, json.loads(ended.stdout))
    assert found.code == 0, ended.stdout
    assert len(found.report["nodes"]) == 2
    assert found.report["where"] == f"the 2 nodes of the Ray at {nodes.address}"
    assert any("gloo sums over 2 nodes" in what for _, what in found.of("ok"))
    assert found.has("ok", "2 connections between 2 nodes, each at three ports")

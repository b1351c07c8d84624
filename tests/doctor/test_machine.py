"""Memory, CPUs and limits of a node."""

from dataclasses import replace
from pathlib import Path

import pytest

from clm_dist.config.job import ClusterConfig
from clm_dist.doctor.finding import Finding
from clm_dist.doctor.machine import judge_amounts, judge_machine
from clm_dist.machine import Machine, read_machine

GIB = 2**30
LARGE = Machine(
    host="a",
    cpus=16,
    usable_cpus=16,
    available_memory=64 * GIB,
    memory_limit=None,
    memory_used=0,
    shm=32 * GIB,
    free_shm=32 * GIB,
    open_files=65536,
)


def judged(machine: Machine, cpus_each: float = 1, num_workers: int = 2) -> list[Finding]:
    return list(judge_machine(machine, cpus_each, num_workers=num_workers))


def test_a_large_machine_is_ok() -> None:
    assert [finding.severity for finding in judged(LARGE)] == ["ok"]


def test_this_machine_is_read() -> None:
    found = read_machine(Path("/nowhere"))
    assert found.memory > 0
    assert found.usable_cpus >= 1
    assert found.open_files > 0


VERSION_2 = "0::/slurm/job_7/step_0\n"
VERSION_1 = "3:memory:/slurm/job_7\n2:cpu,cpuacct:/slurm/job_7\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files"),
    [
        # The limit of the job holds for its step.
        (
            VERSION_2,
            {
                "slurm/job_7/memory.max": "4294967296",
                "slurm/job_7/memory.current": "1073741824",
                "slurm/job_7/step_0/memory.max": "max",
                "slurm/job_7/step_0/memory.current": "17",
                "slurm/memory.max": "64424509440",
                "slurm/memory.current": "1073741824",
                "slurm/job_7/cpu.max": "150000 100000",
                "slurm/cpu.max": "max 100000",
            },
        ),
        (
            VERSION_1,
            {
                "memory/slurm/job_7/memory.limit_in_bytes": "4294967296",
                "memory/slurm/job_7/memory.usage_in_bytes": "1073741824",
                "cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "150000",
                "cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000",
            },
        ),
        # As a container shows its own.
        ("0::/\n", {"memory.max": "4294967296", "memory.current": "1073741824", "cpu.max": "150000 100000"}),
    ],
    ids=["version 2", "version 1", "container"],
)
def test_limits_of_a_cgroup_are_read(tmp_path: Path, own: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    found = read_machine(tmp_path, own)
    assert (found.memory_limit, found.memory_used) == (4 * GIB, GIB)
    assert found.usable_cpus <= 1.5
    assert (found.cpus == 1) == ("cpu.max" in files)


@pytest.mark.parametrize("name", ["inactive_file", "total_inactive_file"])
def test_files_that_nobody_reads_any_more_are_no_used_memory(tmp_path: Path, name: str) -> None:
    for file, text in {"memory.max": 4 * GIB, "memory.current": 3 * GIB}.items():
        (tmp_path / file).write_text(str(text))
    (tmp_path / "memory.stat").write_text(f"anon {GIB}\n{name} {2 * GIB}\n")
    found = read_machine(tmp_path, "0::/\n")
    assert (found.memory_limit, found.memory_used) == (4 * GIB, GIB)


@pytest.mark.parametrize("text", ["max", "9223372036854771712"])
def test_a_cgroup_without_a_limit_has_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "memory.max").write_text(text)
    (tmp_path / "memory.current").write_text("1")
    (tmp_path / "cpu.max").write_text("max 100000")
    found = read_machine(tmp_path, "0::/\n")
    assert found.memory_limit is None
    assert found.memory == found.available_memory


def test_little_memory_is_told_with_the_limit() -> None:
    (finding,) = judged(replace(LARGE, memory_limit=2 * GIB, memory_used=GIB))
    assert finding.severity == "warning"
    assert "1.0 GiB of memory are free, for 2 workers; its cgroup has a limit of 2.0 GiB" in finding.what


def test_a_small_shared_memory_is_told() -> None:
    (finding,) = judged(replace(LARGE, shm=64 * 2**20, free_shm=64 * 2**20))
    assert "64.0 MiB of 64.0 MiB of /dev/shm" in finding.what


def test_few_open_files_are_told() -> None:
    (finding,) = judged(replace(LARGE, open_files=1024))
    assert "1,024 files" in finding.what


def test_fewer_cpus_than_the_workers_take_are_told() -> None:
    (finding,) = judged(replace(LARGE, usable_cpus=2), cpus_each=4)
    assert "may use 2 of 16 CPUs" in finding.what
    # Of a machine that is smaller than what is asked for, the shortage is told.
    assert [one.severity for one in judged(replace(LARGE, cpus=2, usable_cpus=2), cpus_each=4)] == ["ok"]


def test_workers_that_do_not_fit_are_an_error() -> None:
    cluster = ClusterConfig(workers=4, cpus_per_worker=2)
    (finding,) = judge_amounts({"a": {"CPU": 4}, "b": {"CPU": 3}}, cluster, "the nodes")
    assert (finding.severity, finding.subject) == ("error", "machine")
    assert "set cluster.workers to 3 or less" in finding.mend
    assert not list(judge_amounts({"a": {"CPU": 4}, "b": {"CPU": 4}}, cluster, "the nodes"))


def test_gpus_that_are_not_there_are_an_error_where_the_job_asks_for_them() -> None:
    nodes = {"a": {"CPU": 8.0, "GPU": 1.0}}
    (finding,) = judge_amounts(nodes, ClusterConfig(workers=2), "the nodes")
    assert (finding.severity, finding.subject) == ("error", "gpus")
    assert not list(judge_amounts(nodes, ClusterConfig(workers=2, gpus_per_worker=0), "the nodes"))
    assert not list(judge_amounts({"a": {"CPU": 8.0}}, ClusterConfig(workers=2), "the nodes"))

"""The nodes of the Slurm job that this shell is in, and a probe on each of them as a step of that job."""

import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from clm_dist.doctor.bounded import output_of
from clm_dist.doctor.link import Started
from clm_dist.doctor.network import is_loopback

_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Allocation:
    """A Slurm job, as this process sees it."""

    job_id: str
    nodes: tuple[str, ...]
    hints: dict[str, list[str]]
    """Addresses that Slurm, or a name, has of each node."""
    cpus: dict[str, float]
    gpus: float
    """Of each node."""


def is_inside(environment: Mapping[str, str]) -> bool:
    """Whether this shell is in a Slurm job that has other nodes than this one."""
    if "SLURM_JOB_ID" not in environment:
        return False
    # A shell of salloc may be on a login node.
    return environment.get("SLURM_JOB_NUM_NODES", "1") != "1" or "SLURMD_NODENAME" not in environment


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """The nodes of this shell's job. Raises OSError where Slurm does not tell them, as of a job that has ended."""
    job_id = environment["SLURM_JOB_ID"]
    state = re.search(r"JobState=(\w+)", output_of(["scontrol", "show", "job", "--oneliner", job_id], _TIMEOUT_S))
    if state is None or state[1] != "RUNNING":
        raise OSError(f"job {job_id} is {state[1] if state else 'not known'}")
    names = output_of(["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]], _TIMEOUT_S).split()
    shown = output_of(["scontrol", "show", "node", "--oneliner", ",".join(names)], _TIMEOUT_S)
    known = {
        name[1]: address[1]
        for line in shown.splitlines()
        if (name := re.search(r"NodeName=(\S+)", line)) and (address := re.search(r"NodeAddr=(\S+)", line))
    }
    cpus = parse_counts(environment.get("SLURM_JOB_CPUS_PER_NODE", "1"))
    return Allocation(
        job_id,
        tuple(names),
        {name: [*_addresses_of(name), *_addresses_of(known.get(name, name))] for name in names},
        dict(zip(names, [*cpus, *cpus[-1:] * len(names)], strict=False)),
        float(environment.get("SLURM_GPUS_ON_NODE") or 0),
    )


def parse_counts(text: str) -> list[float]:
    """The counts of nodes in `4(x2),8`: 4, 4, 8."""
    found: list[float] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [float(count)] * int(times or 1)
    return found


def _addresses_of(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [address for *_, place in found if not is_loopback(address := str(place[0]))]


def start_probe(allocation: Allocation, node: str, environment: Mapping[str, str]) -> Started:
    """A step of one task, which shares what the job has on the node with other steps."""
    cpus = int(allocation.cpus.get(node, 1))
    command = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
    command += ["--cpu-bind=none", "--mem=0", "--unbuffered", "--export=ALL", f"--nodelist={node}"]
    # What sbatch sets for the job would be taken for the step.
    step = {name: value for name, value in environment.items() if not re.match(r"SLURM_(NTASKS|NPROCS|TRES)", name)}
    return Started([*command, sys.executable, "-P", "-m", "clm_dist.doctor.probe"], step)

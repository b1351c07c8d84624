"""What an examination asks of one node, and the node's answers: lines of JSON, whoever carries them.

`python -m clm_dist.doctor.probe` answers on its standard streams.
"""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace

from pydantic import TypeAdapter

from clm_dist.doctor.bounded import begin
from clm_dist.doctor.collective import Order, Sum
from clm_dist.doctor.disk import Disk, measure_write, read_disk
from clm_dist.doctor.environment import is_offline, read_environment
from clm_dist.doctor.gpus import Gpus, read_gpus
from clm_dist.doctor.hub_reach import Answer, ask_hub
from clm_dist.doctor.network import Network, read_network
from clm_dist.doctor.peer import Listener, Peer, Reach, Speed, measure_speed, reach_all
from clm_dist.doctor.shared import LeaseTrial, Locked, Meeting, Seen, read_object, remove_object, write_object
from clm_dist.doctor.versions import Versions, read_versions
from clm_dist.machine import Machine, read_machine
from clm_dist.submit.ray_settings import interface_of

ANSWER = "clm-dist-doctor "
"""The begin of lines with answers; a node may print others."""
_DISK_S = 3.0
_GPUS_S = 5.0


@dataclass(frozen=True)
class Facts:
    """All that a node tells of itself."""

    versions: Versions
    machine: Machine
    gpus: Gpus
    network: Network
    variables: dict[str, str]
    disks: dict[str, Disk] = field(default_factory=dict)
    """Of each directory that was asked for, but for those that do not answer."""


class Probe:
    """The examination of this node. Each public method answers one question."""

    def __init__(self) -> None:
        self._listener: Listener | None = None
        self._token = b""
        self._trials: dict[str, LeaseTrial] = {}
        self._collective: subprocess.Popen[str] | None = None
        self._hub: Future[list[Answer]] | None = None

    def facts(self, directories: list[str]) -> Facts:
        disks = {path: begin(read_disk, path) for path in directories}
        end = time.monotonic() + _DISK_S
        gpus = begin(read_gpus)
        facts = Facts(read_versions(), read_machine(), Gpus(), read_network(_DISK_S), read_environment())
        try:
            found = gpus.result(timeout=_GPUS_S)
        except TimeoutError:
            found = Gpus(problem=f"nvidia-smi does not end within {_GPUS_S:g} s")
        facts = replace(facts, gpus=found)
        for path, disk in disks.items():
            with contextlib.suppress(TimeoutError):
                facts.disks[path] = disk.result(timeout=max(0.0, end - time.monotonic()))
        return facts

    def listen(self, token: str) -> dict[str, int]:
        """Listen at a port for each use of a run until the end; the ports."""
        self._token = token.encode()
        self._listener = Listener(self._token)
        return self._listener.ports

    def reach(self, peers: list[Peer]) -> list[Reach]:
        return reach_all(peers, self._token)

    def speed(self, source: str, peer: Peer) -> Speed:
        return measure_speed(source, peer, self._token)

    def write(self, meeting: Meeting, node: str) -> str | None:
        return meeting.write(node)

    def read(self, meeting: Meeting, nodes: list[str]) -> Seen:
        return meeting.read(nodes)

    def begin_lease(self, meeting: Meeting) -> None:
        self._trials[meeting.directory] = LeaseTrial(meeting.directory)

    def lease(self, meeting: Meeting) -> Locked | None:
        """How this node fares with the lease, as far as that is known."""
        return self._trials[meeting.directory].result

    def end_lease(self, meeting: Meeting) -> None:
        self._trials[meeting.directory].release()

    def remove(self, meeting: Meeting) -> None:
        meeting.remove()

    def write_object(self, url: str, token: str) -> tuple[str, bool] | None:
        return write_object(url, token)

    def read_object(self, url: str, token: str) -> tuple[str, bool] | None:
        return read_object(url, token)

    def remove_object(self, url: str, token: str) -> None:
        remove_object(url, token)

    def write_speed(self, directory: str) -> float:
        return measure_write(directory)

    def begin_hub(self, models: list[str], dataset: str | None) -> None:
        """Ask the Hub meanwhile."""
        variables = read_environment()
        offline, data_offline = is_offline(variables), is_offline(variables, of_data=True)
        self._hub = begin(ask_hub, tuple(models), dataset, offline, data_offline)

    def hub(self, timeout_s: float) -> list[Answer] | None:
        """What the Hub answered; None where it has not yet."""
        assert self._hub is not None
        try:
            return self._hub.result(timeout=timeout_s)
        except TimeoutError:
            return None

    def begin_collective(self, address: str, in_ray: bool) -> None:
        """Start the process of a collective, which imports torch meanwhile."""
        environment = dict(os.environ)
        if in_ray:
            # Ray hides all GPUs from an actor that takes none.
            environment.pop("CUDA_VISIBLE_DEVICES", None)
        elif interface := interface_of(address):
            # As what starts a run's workers does it.
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                environment.setdefault(name, interface)
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        environment.setdefault("OMP_NUM_THREADS", "1")
        self._collective = subprocess.Popen(
            [sys.executable, "-P", "-m", "clm_dist.doctor.all_reduce"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def collective_ready(self, timeout_s: float) -> bool | None:
        """Whether torch is imported within a time; None where it cannot be."""
        line = self._line_of_collective(timeout_s)
        return False if line is None else True if line == "ready\n" else None

    def free_port(self) -> int:
        with socket.create_server(("", 0)) as one:
            return int(one.getsockname()[1])

    def collective(self, order: Order, timeout_s: float) -> Sum:
        """What this rank measured; every node's probe must be asked at once."""
        assert self._collective is not None
        assert self._collective.stdin is not None
        try:
            self._collective.stdin.write(json.dumps(asdict(order)) + "\n")
            self._collective.stdin.flush()
            line = self._line_of_collective(timeout_s)
            if line is None:
                return Sum(problem=f"it does not end within {timeout_s:.0f} s")
            return Sum(**json.loads(line))
        except (OSError, ValueError):
            return Sum(problem="its process has ended")

    def _line_of_collective(self, timeout_s: float) -> str | None:
        """The next line of that process, empty at its end; None where it says nothing in time."""
        assert self._collective is not None
        assert self._collective.stdout is not None
        ready, _, _ = select.select([self._collective.stdout], [], [], timeout_s)
        return self._collective.stdout.readline() if ready else None

    def close(self) -> None:
        """End what was started for the examination."""
        if self._listener:
            self._listener.close()
        for trial in self._trials.values():
            trial.release()
        if self._collective:
            self._collective.kill()
            self._collective.wait()

    def answer(self, line: str) -> str:
        """Answer a question: `{"ask": NAME, "with": {...}}` to `{"value": ...}`, or `{"error": ...}` of its class."""
        try:
            question = json.loads(line)
            method = getattr(self, question["ask"])
            arguments = {
                name: TypeAdapter(method.__annotations__[name]).validate_python(value)
                for name, value in question["with"].items()
            }
            value = method(**arguments)
            return json.dumps({"value": TypeAdapter(type(value)).dump_python(value, mode="json")})
        except Exception as error:  # whatever it is, the one who asks has to know
            return json.dumps({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Answer lines of standard input until it ends."""
    probe = Probe()
    for line in sys.stdin:
        print(f"{ANSWER}{probe.answer(line)}", flush=True)
    probe.close()
    # A thread may wait for a disk that does not answer.
    os._exit(0)


if __name__ == "__main__":
    main()

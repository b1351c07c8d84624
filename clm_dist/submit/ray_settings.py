"""Settings of Ray on the hosts of a cluster, and how a host finds the others."""

import contextlib
import fcntl
import os
import signal
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
RAY_SETTINGS = {
    # Seconds that a node waits for a head that does not answer.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    # Ray removes a host that it cannot reach within 20 s, not within a minute.
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def address_towards(host: str) -> str:
    """The address of this host on the network that leads to another host. Sends nothing."""
    family, kind, *_, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def answers(host: str, port: int) -> bool:
    """Whether a process listens on a port of a host."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def interface_of(address: str) -> str | None:
    """The network interface that has an address."""
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address).hex()
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
        return next((line.split()[-1] for line in lines if line.startswith(packed)), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def end_descendants() -> None:
    """Kill all descendants of this process, and wait for them."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    # The children of each process that ends become children of this one.
    while pids := children.read_text().split():
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.wait()

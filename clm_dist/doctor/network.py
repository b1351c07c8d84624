"""The networks of a node, the address at which the others reach it, and what was measured between nodes."""

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clm_dist.doctor.bounded import begin
from clm_dist.doctor.finding import Finding, error, note, ok, on, unchecked, warning
from clm_dist.doctor.peer import Reach, Speed

_SIOCGIFADDR = 0x8915
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SLOW_BYTES_PER_S = 100e6
"""Below gigabit Ethernet."""
_UNEVEN = 3.0
_LATE_S = 0.005


@dataclass(frozen=True)
class Network:
    """The networks of a node."""

    hostname: str
    resolved: tuple[str, ...]
    """Addresses that its own name stands for there."""
    addresses: dict[str, tuple[str, ...]]
    """Of each interface that is up, without those that are valid on one cable alone."""
    variables: dict[str, str]
    """GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."""

    @property
    def reachable(self) -> list[str]:
        """The addresses that another node may reach."""
        return [one for found in self.addresses.values() for one in found if not is_loopback(one)]


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def read_network(timeout_s: float) -> Network:
    """The networks of this node. A name that is not resolved in time counts as one that stands for nothing."""
    hostname = socket.gethostname()
    resolved: list[str] = []
    asked = begin(lambda: socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM))
    with contextlib.suppress(OSError, TimeoutError):
        resolved = [str(found[4][0]) for found in asked.result(timeout=timeout_s)]
    variables = {name: value for name in _VARIABLES if (value := os.environ.get(name))}
    return Network(hostname, tuple(dict.fromkeys(resolved)), _addresses(), variables)


def _addresses() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                if (Path("/sys/class/net") / name / "operstate").read_text().strip() == "down":
                    continue
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.setdefault(name, []).append(socket.inet_ntoa(answer[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            packed, *_, name = line.split()
            address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(packed))
            if not address.startswith("fe80:"):
                found.setdefault(name, []).append(address)
    return {name: tuple(addresses) for name, addresses in found.items()}


def choose_address(found: Network, hints: Sequence[str], interface: str | None) -> str | None:
    """The address at which a run's other nodes reach a node; None where there is none.

    Args:
        hints: addresses that the scheduler, or Ray, knows of it.
        interface: the network that the job names.
    """
    named = interface or found.variables.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if named in found.addresses:
        return found.addresses[named][0]
    return next((hint for hint in hints if hint in found.reachable), next(iter(found.reachable), None))


def judge_interfaces(
    found: Network, *, names_interface: bool, interface: str | None = None, is_one_host: bool = False
) -> Iterator[Finding]:
    """The findings of the names of a node's networks, where it is one of several.

    Args:
        names_interface: whether what starts the run's workers there sets GLOO_SOCKET_IFNAME, unless it is set.
        interface: the network that `cluster.slurm.interface` names.
        is_one_host: whether all nodes are on one host, so that every address will do.
    """
    there = ", ".join(name for name, addresses in found.addresses.items() if not all(map(is_loopback, addresses)))
    names = [(name, value, _interfaces_of(name, value)) for name, value in found.variables.items()]
    if interface:
        names.append(("cluster.slurm.interface", interface, [(interface, True)]))
    for name, value, wanted in names:
        missing = [one for one, exact in wanted if not _is_there(one, exact, found)]
        if missing if name != "NCCL_SOCKET_IFNAME" else len(missing) == len(wanted) > 0:
            yield error(
                "network",
                f"{name}={value}: such an interface is not up here, or has no address (here are: {there or 'none'})",
                "workers on this node find no address to listen at, and the run fails",
                f"set {name} to a network that all nodes have, or unset it",
            )
    loopback = [address for address in found.resolved if is_loopback(address)]
    # gloo takes the first.
    if is_one_host or (found.resolved and not is_loopback(found.resolved[0])):
        return
    trap = f"the own name of the host stands for {', '.join(loopback) or 'no address'} there"
    if "GLOO_SOCKET_IFNAME" in found.variables:
        return
    if names_interface:
        yield note(
            "network",
            trap,
            "what clm-dist starts here names the interface itself; other programs that use gloo would listen there",
        )
        return
    yield error(
        "network",
        trap,
        "gloo listens at the address of the host's name, where no other node reaches it, and the workers wait for ever",
        "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network between the nodes where Ray is started, or mend "
        "/etc/hosts",
    )


def _interfaces_of(variable: str, value: str) -> list[tuple[str, bool]]:
    """The interfaces that a variable wants, and whether by their whole names; NCCL takes beginnings of names."""
    if variable != "NCCL_SOCKET_IFNAME":
        return [(name.strip(), True) for name in value.split(",")]
    if value.startswith("^"):
        return []
    return [(name.partition(":")[0], value.startswith("=")) for name in value.removeprefix("=").split(",")]


def _is_there(name: str, exact: bool, found: Network) -> bool:
    return any(one == name or (not exact and one.startswith(name)) for one in found.addresses)


def judge_reach(reaches: Mapping[str, Sequence[Reach]], addresses: Mapping[str, str]) -> Iterator[Finding]:
    """The findings of connections between all pairs of nodes.

    Args:
        reaches: what each node found of its peers.
        addresses: at which each node was reached for.
    """
    blocked = False
    for node, found in reaches.items():
        for peer in dict.fromkeys(reach.peer for reach in found):
            there = [reach for reach in found if reach.peer == peer]
            failed = [reach for reach in there if reach.problem]
            blocked = blocked or bool(failed)
            yield from on(node, _judge_blocked(peer, addresses[peer], failed, all_of_them=len(failed) == len(there)))
    rtts = {(node, one.peer): one.rtt_s for node, found in reaches.items() for one in found if one.rtt_s is not None}
    if not rtts:
        return
    (slow, peer), most = max(rtts.items(), key=lambda item: item[1])
    shown = f"round trips of {min(rtts.values()) * 1e3:.2f} to {most * 1e3:.2f} ms"
    if most > _LATE_S:
        yield warning(
            "network",
            f"{shown}; the longest is from {slow} to {peer}",
            "each step waits for several round trips of the slowest pair",
            "take nodes that are near each other, or look for what loads that network",
        )
    elif not blocked:
        num = len(reaches)
        yield ok("network", f"{num * (num - 1)} connections between {num} nodes, each at three ports; {shown}")


def _judge_blocked(peer: str, address: str, failed: Sequence[Reach], *, all_of_them: bool) -> Iterator[Finding]:
    if all_of_them:
        ports = ", ".join(str(reach.port) for reach in failed)
        yield error(
            "network",
            f"{peer} ({address}) cannot be reached at any of the ports {ports}: {failed[0].problem}",
            "the workers of a run connect to each other, and it fails or waits for ever",
            f"look at the network of {peer}: ping {address}, its firewall, the route to it; if {address} is not on the "
            "network between the nodes, set cluster.slurm.interface or GLOO_SOCKET_IFNAME",
        )
        return
    for reach in failed:
        yield error(
            "network",
            f"port {reach.port} of {peer} ({address}) cannot be reached: {reach.problem}",
            f"{reach.use}; the run fails, or waits for ever",
            f"open the ports {reach.ports} between the nodes (the firewall of {peer}, or one between the two)",
        )


def judge_speeds(speeds: Sequence[Speed], num_pairs: int) -> Iterator[Finding]:
    """The findings of the bandwidth between pairs of nodes, one stream of TCP at a time in each pair.

    Args:
        num_pairs: how many there are; what was not measured had no time.
    """
    failed = [speed for speed in speeds if speed.bytes_per_s is None]
    good = sorted((speed for speed in speeds if speed.bytes_per_s), key=lambda one: one.bytes_per_s or 0)
    if missing := num_pairs - len(speeds) + len(failed):
        problem = next((f": {speed.problem}" for speed in failed), "; there was no time")
        yield unchecked("network", f"the bandwidth of {missing} of {num_pairs} pairs of nodes{problem}")
    if not good:
        return
    slowest, rates = good[0], [one.bytes_per_s or 0 for one in good]
    middle = rates[len(rates) // 2]
    shown = f"{_gbit(rates[0])} to {_gbit(rates[-1])} Gbit/s in a stream of TCP (measured {len(good)} ways)"
    if rates[0] < middle / _UNEVEN:
        yield warning(
            "network",
            f"{slowest.source} to {slowest.target}: {_gbit(rates[0])} Gbit/s, where most pairs have {_gbit(middle)}",
            "the gradients of all workers wait for the slowest connection",
            "look at this connection (ethtool, cables, its load), or take another node",
        )
    elif rates[-1] < _SLOW_BYTES_PER_S:
        yield warning(
            "network",
            shown,
            "the workers exchange gradients of the size of the model in each step, and wait for them",
            "name a faster network, if there is one, with cluster.slurm.interface or GLOO_SOCKET_IFNAME",
        )
    else:
        yield ok("network", shown)


def _gbit(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:.3g}"

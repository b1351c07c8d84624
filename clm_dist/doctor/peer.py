"""Connections between nodes: a node listens at ports as a run does, and measures its way to those of others.

A connection begins with a token that only the nodes of this examination know; others are closed. Then the one that has
connected asks for echoes with the time of the other, or sends for a while and is told how much arrived.
"""

import contextlib
import hmac
import random
import socket
import struct
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

_CONNECT_S, _ANSWER_S = 2.0, 3.0
_ECHOES = 8
_SEND_S = 0.25
_CHUNK = 2**20
_ECHO, _SINK = b"e", b"s"
_TIME = struct.Struct("!d")
_COUNT = struct.Struct("!Qd")
USES: Mapping[str, tuple[str, tuple[int, int] | None]] = {
    "ray-workers": ("Ray's workers listen at such ports", (10002, 19999)),
    "ray-head": ("the Ray of a Slurm job listens at such a port", (20000, 29999)),
    "any": ("gloo and NCCL listen at whatever port the system gives them", None),
}
"""What a run listens at: why, and from which port to which; None is any that the system gives."""


@dataclass(frozen=True)
class Peer:
    """Another node, as it can be reached."""

    name: str
    address: str
    ports: dict[str, int]
    """A port for each of `USES`."""


@dataclass(frozen=True)
class Reach:
    """A connection to a port of another node."""

    peer: str
    port: int
    use: str
    """What listens at such a port."""
    ports: str
    """Which ports are such, for people."""
    problem: str | None = None
    rtt_s: float | None = None
    """The shortest round trip."""
    offset_s: float | None = None
    """How much the clock there is ahead of this one, give or take half a round trip."""


@dataclass(frozen=True)
class Speed:
    """The bandwidth from one node to another."""

    source: str
    target: str
    bytes_per_s: float | None
    problem: str | None = None


class Listener:
    """Ports of this node, and threads that answer there until it is closed.

    Args:
        token: which connections have to send.
    """

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._sockets = {use: _listen(span) for use, (_, span) in USES.items()}
        for one in self._sockets.values():
            threading.Thread(target=self._accept, args=(one,), name="doctor-listener", daemon=True).start()

    @property
    def ports(self) -> dict[str, int]:
        return {use: int(one.getsockname()[1]) for use, one in self._sockets.items()}

    def close(self) -> None:
        for one in self._sockets.values():
            # Else it listens as long as a thread waits for a connection.
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=self._serve, args=(connection,), name="doctor-peer", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(_ANSWER_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not hmac.compare_digest(_receive(connection, len(self._token)), self._token):
                return
            if _receive(connection, 1) == _ECHO:
                while True:
                    _receive(connection, 1)
                    connection.sendall(_TIME.pack(time.time()))
            buffer, count, begun = bytearray(_CHUNK), 0, 0.0
            while size := connection.recv_into(buffer):
                begun = begun or time.monotonic()
                count += size
            connection.sendall(_COUNT.pack(count, time.monotonic() - begun))


def _listen(span: tuple[int, int] | None) -> socket.socket:
    """A socket that listens on all networks, at a free port of a span."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    numbers = [0] if span is None else random.sample(range(*span), 20)
    for port in numbers:
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", port), family=family, backlog=128, dualstack_ipv6=family == socket.AF_INET6
            )
    raise OSError(f"no free port among {len(numbers)} of {span}")


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise OSError("the connection was closed")
        data += part
    return data


def reach_all(peers: list[Peer], token: bytes) -> list[Reach]:
    """Connections from this node to all ports of others, at once."""
    pairs = [(peer, use) for peer in peers for use in USES]
    if not pairs:
        return []
    with ThreadPoolExecutor(min(64, len(pairs))) as threads:
        return list(threads.map(lambda pair: _reach(pair[0], pair[1], token), pairs))


def _reach(peer: Peer, use: str, token: bytes) -> Reach:
    why, span = USES[use]
    ports = "all that the system gives (net.ipv4.ip_local_port_range)" if span is None else f"{span[0]} to {span[1]}"
    port = peer.ports[use]
    try:
        with _connect(peer.address, port, token, _ECHO) as connection:
            rtt, offset = min(_echo(connection) for _ in range(_ECHOES))
    except OSError as problem:
        said = "no answer within 2 s" if isinstance(problem, TimeoutError) else problem.strerror or str(problem)
        return Reach(peer.name, port, why, ports, problem=said)
    return Reach(peer.name, port, why, ports, rtt_s=rtt, offset_s=offset)


def _connect(address: str, port: int, token: bytes, kind: bytes) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=_CONNECT_S)
    connection.settimeout(_ANSWER_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(token + kind)
    return connection


def _echo(connection: socket.socket) -> tuple[float, float]:
    """Round trip and offset of the other's clock."""
    # The length by one clock that nobody sets, the middle by the one that people read.
    begun, wall = time.monotonic(), time.time()
    connection.sendall(b"?")
    (there,) = _TIME.unpack(_receive(connection, _TIME.size))
    rtt = time.monotonic() - begun
    return rtt, there - (wall + rtt / 2)


def measure_speed(source: str, peer: Peer, token: bytes) -> Speed:
    """Send to another node for a moment, as fast as it goes; the other counts what arrives."""
    data = bytes(_CHUNK)
    try:
        with _connect(peer.address, peer.ports["any"], token, _SINK) as connection:
            end = time.monotonic() + _SEND_S
            while time.monotonic() < end:
                connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            count, seconds = _COUNT.unpack(_receive(connection, _COUNT.size))
    except OSError as problem:
        return Speed(source, peer.name, None, problem.strerror or str(problem))
    return Speed(source, peer.name, count / seconds if seconds > 0 else None)


def rounds_of(names: list[str]) -> list[list[tuple[str, str]]]:
    """All ordered pairs in rounds, in which no node is in two pairs (the circle method)."""
    ring: list[str | None] = [*names, None] if len(names) % 2 else [*names]
    rounds: list[list[tuple[str, str]]] = []
    for _ in range(len(ring) - 1):
        pairs = [(a, b) for a, b in zip(ring, reversed(ring), strict=True)][: len(ring) // 2]
        forward = [(a, b) for a, b in pairs if a is not None and b is not None]
        rounds += [forward, [(b, a) for a, b in forward]]
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return [one for one in rounds if one]

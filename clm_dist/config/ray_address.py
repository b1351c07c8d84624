"""The Ray that RAY_ADDRESS names: whether somebody is there."""

import os
import re
import socket

from clm_dist.errors import ConfigError

_CONNECT_S = 10
_ANSWER_S = 5
# The head of a frame of HTTP/2: length (3 bytes), type, flags, stream (4).
_SETTINGS = b"\x04"
_EMPTY_SETTINGS = b"\0\0\0" + _SETTINGS + b"\0" + b"\0\0\0\0"
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _EMPTY_SETTINGS


def expected_nodes() -> int | None:
    """How many nodes that Ray is to have, where who starts it and this process says so; they may not be there yet."""
    return int(os.environ["CLM_DIST_NODES"]) if "CLM_DIST_NODES" in os.environ else None


def host_and_port(address: str) -> tuple[str, int] | None:
    """The parts of `10.0.0.1:6379` or `[fd00::1]:6379`; None for what is not such an address, like `auto`."""
    parts = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+)):(\d{1,5})", address, re.ASCII)
    return (parts[1] or parts[2], int(parts[3])) if parts else None


def check_ray_address(address: str) -> None:
    """Raise ConfigError if no program listens at an address of Ray, or one that is no Ray.

    Ray itself would wait for minutes, or twenty seconds.
    """
    plain = address.removeprefix("ray://")
    found = host_and_port(plain)
    if found is None:
        if plain.count(":") > 1 and "://" not in plain:
            raise no_ray(address, "an IPv6 address is in brackets, as in [fd00::1]:6379")
        return
    try:
        connection = socket.create_connection(found, timeout=_CONNECT_S)
    except OSError as error:
        raise no_ray(address, error.strerror or str(error)) from None
    except UnicodeError as error:  # a part of the name is too long
        raise no_ray(address, str(error)) from None
    with connection:
        connection.settimeout(_ANSWER_S)
        try:
            is_ray = _is_tls() or _speaks_grpc(connection)
        except TimeoutError:
            problem = f"it answers nothing within {_ANSWER_S} s, as no Ray does that is not very busy"
            raise no_ray(address, problem) from None
    if not is_ray:
        raise no_ray(address, "what listens there is no Ray")


def _is_tls() -> bool:
    """Whether Ray's connections are encrypted, so that nothing is said in the clear."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether the other side greets as a server of gRPC does, which is HTTP/2 (RFC 9113, section 3.4)."""
    try:
        connection.sendall(_GREETING)
        answer = b""
        while len(answer) < len(_EMPTY_SETTINGS) and (more := connection.recv(len(_EMPTY_SETTINGS) - len(answer))):
            answer += more
    except ConnectionError:
        return False
    return answer[3:4] == _SETTINGS and answer[5:] == _EMPTY_SETTINGS[5:]


def no_ray(address: str, problem: str) -> ConfigError:
    """The error of an address at which no Ray is."""
    return ConfigError(f"RAY_ADDRESS {address}: {problem}; start that Ray, or unset RAY_ADDRESS to work here")

"""The Ray that RAY_ADDRESS names: whether somebody is there."""

import os
import socket

from clm_dist.errors import ConfigError

_CONNECT_S = 10


def expected_nodes() -> int | None:
    """How many nodes that Ray is to have, where who starts it and this process says so; they may not be there yet."""
    return int(os.environ["CLM_DIST_NODES"]) if "CLM_DIST_NODES" in os.environ else None


def check_ray_address(address: str) -> None:
    """Raise ConfigError if no program listens at an address of Ray. Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise no_ray(address, error.strerror or str(error)) from None


def no_ray(address: str, problem: str) -> ConfigError:
    """The error of an address at which no Ray is."""
    return ConfigError(f"RAY_ADDRESS {address}: {problem}; start that Ray, or unset RAY_ADDRESS to work here")

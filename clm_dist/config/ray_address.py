"""The Ray that RAY_ADDRESS names: whether somebody is there."""

import os
import re
import socket

from clm_dist.errors import ConfigError

_CONNECT_S = 10


def expected_nodes() -> int | None:
    """How many nodes that Ray is to have, where who starts it and this process says so; they may not be there yet."""
    return int(os.environ["CLM_DIST_NODES"]) if "CLM_DIST_NODES" in os.environ else None


def host_and_port(address: str) -> tuple[str, int] | None:
    """The parts of `10.0.0.1:6379` or `[fd00::1]:6379`; None for what is not such an address, like `auto`."""
    parts = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+)):(\d{1,5})", address, re.ASCII)
    return (parts[1] or parts[2], int(parts[3])) if parts else None


def check_ray_address(address: str) -> None:
    """Raise ConfigError if no program listens at an address of Ray. Ray itself would wait for minutes."""
    plain = address.removeprefix("ray://")
    found = host_and_port(plain)
    if found is None:
        if plain.count(":") > 1 and "://" not in plain:
            raise no_ray(address, "an IPv6 address is in brackets, as in [fd00::1]:6379")
        return
    try:
        socket.create_connection(found, timeout=_CONNECT_S).close()
    except OSError as error:
        raise no_ray(address, error.strerror or str(error)) from None
    except UnicodeError as error:  # a part of the name is too long
        raise no_ray(address, str(error)) from None


def no_ray(address: str, problem: str) -> ConfigError:
    """The error of an address at which no Ray is."""
    return ConfigError(f"RAY_ADDRESS {address}: {problem}; start that Ray, or unset RAY_ADDRESS to work here")

"""A RAY_ADDRESS at which no Ray is."""

import pytest
import ray

from clm_dist.config import ClusterConfig
from clm_dist.errors import ConfigError
from clm_dist.prepare.tasks import open_pool
from clm_dist.ray_address import check_ray_address
from clm_dist.train.cluster import start_ray


def test_a_ray_that_is_not_there_is_said_at_once() -> None:
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS {address}: Connection refused; start that Ray, or unset"):
            check_ray_address(address)
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS no-such-host.invalid:6379: .*; start that Ray"):
        check_ray_address("no-such-host.invalid:6379")
    for address in ("auto", "local"):
        check_ray_address(address)


@pytest.mark.parametrize(
    ("address", "problem"), [("127.0.0.1:1", "Connection refused"), ("nowhere", "Invalid address format: nowhere")]
)
def test_both_who_join_a_ray_say_so(address: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    said = f"RAY_ADDRESS {address}: {problem}; start that Ray, or unset RAY_ADDRESS"
    with pytest.raises(ConfigError, match=said), start_ray(ClusterConfig()):
        pass
    if problem == "Connection refused":
        with pytest.raises(ConfigError, match=said), open_pool(None, is_small=False):
            pass

"""An object on every node of the Ray at RAY_ADDRESS, without a CPU of it."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clm_dist.config.ray_address import check_ray_address, no_ray
from clm_dist.errors import first_line
from clm_dist.train.ray import private
from clm_dist.train.ray.own import parting


@dataclass(frozen=True)
class RayNode:
    """A node, and the object on it."""

    name: str
    address: str
    resources: dict[str, float]
    _actor: Any

    def ask(self, line: str) -> "Future[str]":
        """Call the object's method `answer`."""
        answer: Future[str] = self._actor.answer.remote(line).future()
        return answer

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the node may be gone
            self._actor.close.remote()


@contextlib.contextmanager
def on_every_node(address: str, kind: type[Any]) -> Iterator[list[RayNode]]:
    """Join a Ray, and make an object of a class with the methods `answer` and `close` on each node that is alive.

    Raises ConfigError where no Ray is there.
    """
    check_ray_address(address)
    private.forget_token()
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ValueError, ConnectionError, RuntimeError) as error:
        raise no_ray(address, first_line(error)) from None
    with parting():
        actor = ray.remote(num_cpus=0, max_restarts=0)(kind)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        yield [
            RayNode(
                name,
                node["NodeManagerAddress"],
                node["Resources"],
                actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(),
            )
            for name, node in zip(_names_of(nodes), nodes, strict=True)
        ]


def _names_of(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of nodes that differ: of their hosts, or else their addresses, or else with the begin of their ids."""
    for key in ("NodeManagerHostname", "NodeManagerAddress"):
        names = [str(node[key]) for node in nodes]
        if len(set(names)) == len(names):
            return names
    return [f"{node['NodeManagerHostname']}-{node['NodeID'][:8]}" for node in nodes]

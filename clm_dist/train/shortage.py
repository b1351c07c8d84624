"""Whether the workers of a job fit on the nodes that there are; imports no Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clm_dist.config.job import ClusterConfig


@dataclass(frozen=True)
class Shortage:
    """A resource of which a cluster has too little for the fewest workers that a job takes."""

    kind: str
    each: float
    """Amount that a worker takes."""
    workers: int
    available: float
    fitting: int
    """Workers that fit."""
    num_nodes: int

    def describe(self, where: str = "the Ray cluster") -> str:
        spread = f" on {self.num_nodes} nodes, which fit {self.fitting} workers" if self.num_nodes > 1 else ""
        needs = f"cluster.workers {self.workers} x {self.each:g} {self.kind} need {self.workers * self.each:g}"
        return f"{needs}, {where} has {self.available:g}{spread}"


def find_shortage(cluster: ClusterConfig, gpus_each: int, nodes: Sequence[Mapping[str, float]]) -> Shortage | None:
    """The shortage of nodes for the fewest workers; None if there is none."""
    workers = cluster.min_workers
    for kind, each in (("GPU", gpus_each), ("CPU", cluster.cpus_per_worker)):
        # A worker lies on one node.
        fitting = sum(int(node.get(kind, 0) // each) for node in nodes) if each else workers
        if fitting < workers:
            available = sum(node.get(kind, 0) for node in nodes)
            return Shortage(kind, each, workers, available, fitting, len(nodes))
    return None

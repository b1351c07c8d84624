"""Whether a job's workers fit the hosts that it asks a cluster for."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from clm_dist.config.job import ClusterConfig
from clm_dist.errors import ConfigError


@dataclass(frozen=True)
class Hosts:
    """A number of equal hosts, with their names in the job file and on the command line."""

    cluster: ClusterConfig
    count: int
    gpus: int
    """GPUs of each host."""
    cpus: int
    section: str
    """`cluster.slurm`"""
    noun: str
    """`node`; the fields are `nodes`, `gpus_per_node`, `cpus_per_node`."""
    count_option: str
    gpus_option: str

    @classmethod
    def cpus_for(cls, cluster: ClusterConfig, hosts: int) -> int:
        """CPUs that the workers of one host take."""
        return math.ceil(math.ceil(cluster.max_workers / hosts) * cluster.cpus_per_worker)

    @property
    def gpus_each(self) -> int:
        """GPUs of a worker."""
        each = self.cluster.gpus_per_worker
        return int(self.gpus > 0) if each == "auto" else each

    @property
    def idle_gpus(self) -> int:
        """GPUs that are asked for and that no worker takes."""
        return max(0, self.count * self.gpus - self.cluster.max_workers * self.gpus_each)

    def warnings(self) -> Iterator[str]:
        """What the user may not have intended."""
        if self.idle_gpus:
            each, most = "none" if self.cluster.gpus_per_worker == 0 else "one", self.cluster.max_workers
            yield f"{self.idle_gpus} of the GPUs stay idle: cluster.workers is {most}, and a worker takes {each}"
        if not self.gpus:
            yield f"no GPUs are asked for, so this trains on CPUs; {self.gpus_option} asks"

    def check(self) -> None:
        """Raise ConfigError where the workers do not fit."""
        cluster, workers = self.cluster, self.cluster.min_workers
        if cluster.gpus_per_worker == 1 and not self.gpus:
            raise ConfigError(
                f"cluster.gpus_per_worker is 1, and no GPUs are asked for; say how many each {self.noun} has with "
                f"{self.gpus_option}",
                field=f"{self.section}.gpus_per_{self.noun}",
            )
        for kind, per_host, each in (
            ("GPUs", self.gpus, self.gpus_each),
            ("CPUs", self.cpus, cluster.cpus_per_worker),
        ):
            fitting = self.count * int(per_host // each) if each else workers
            if fitting < workers:
                field = f"{kind.lower()}_per_{self.noun}"
                hosts = math.ceil(workers / (per_host // each)) if per_host >= each else None
                advice = [f"{self.count_option} {hosts}"] if hosts else [f"a larger {self.section}.{field}"]
                advice += [f"--set cluster.workers={fitting}"] if fitting else []
                raise ConfigError(
                    f"cluster.workers {workers} x {each:g} {kind} do not fit {self.count} x {per_host} "
                    f"({self.section}.{self.noun}s x {field}); take {' or '.join(advice)}",
                    field="cluster.workers",
                )

"""Where a job is to run, and what was measured of its speed."""

from dataclasses import dataclass

from clm_dist.devices import Device
from clm_dist.plan.speed import Speed


@dataclass(frozen=True)
class Target:
    """The GPUs that a plan is for."""

    device: Device | None
    """None where it is not known: then there is neither a limit of memory nor, unless it is measured, a time."""
    gpus_per_node: int
    nodes: tuple[int, ...]
    """Numbers of hosts to compare."""
    between_nodes: float
    """Bandwidth of a host to others, bytes a second in one direction."""
    price: float | None = None
    """Price of a GPU for an hour."""
    is_other_gpu: bool = False
    """Whether it is a GPU that is not known."""

    @property
    def is_gpu(self) -> bool:
        return self.device is not None or self.is_other_gpu


@dataclass(frozen=True)
class MeasuredSpeed:
    """A speed with what it was measured on."""

    speed: Speed
    device: Device | None
    """None for a CPU, or a GPU that is not known."""
    is_gpu: bool
    name: str
    """Name of the device that was measured, as its driver has it; `CPU` where there is none."""
    workers: int
    workers_per_node: int
    notes: tuple[str, ...]

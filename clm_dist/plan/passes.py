"""The passes of a step, and the blocks that a run finds for them where `batch.micro_size` is `auto`."""

from dataclasses import dataclass, replace

from clm_dist.config.job import JobConfig
from clm_dist.devices import Device
from clm_dist.plan.architecture import Architecture
from clm_dist.plan.memory import Setting, largest_micro_size


@dataclass(frozen=True)
class Passes:
    """The passes of a job's steps on any number of workers."""

    job: JobConfig
    model: Architecture
    device: Device | None
    found: int | None
    """Blocks of a pass that were found where the speed was measured."""

    def on(self, workers: int, setting: Setting) -> Setting:
        """A setting of the job on so many workers."""
        batch = self.job.batch
        at = replace(setting, world_size=workers, passes=batch.passes_per_step(workers))
        if batch.micro_size != "auto":
            return at
        most = self.found or 1
        if self.found is None and self.device is not None:
            most = max(1, largest_micro_size(self.model, at, self.device.memory_bytes))
        size = batch.even_micro_size(min(most, batch.global_size // workers), workers)
        passes = self.job.with_micro_size(size).batch.passes_per_step(workers)
        return replace(at, micro_size=size, passes=passes)

    def note(self) -> str | None:
        """What is to be said of them."""
        if self.job.batch.micro_size != "auto" or self.found is not None:
            return None
        if self.device is None:
            return "batch.micro_size is auto, and 1 is taken: name a GPU with --gpu, or measure with --probe or --from"
        return f"batch.micro_size is auto: a pass has the blocks that fit {self.device.name} here; a run tries it"

"""The passes of a step, and the blocks that a run finds for them where `batch.micro_size` is `auto`."""

from dataclasses import replace

from clm_dist.config.job import JobConfig
from clm_dist.devices import Device
from clm_dist.plan.architecture import Architecture
from clm_dist.plan.memory import Setting, largest_micro_size
from clm_dist.plan.speed import Speed


def most_blocks(
    job: JobConfig,
    model: Architecture,
    setting: Setting,
    device: Device | None,
    speed: Speed | None,
    notes: list[str],
) -> int | None:
    """The most blocks of a pass that a run finds for `batch.micro_size: auto`; None where the job says them."""
    if job.batch.micro_size != "auto":
        return None
    if speed is not None and speed.micro_size:
        return speed.micro_size
    if device is None:
        notes.append(
            "batch.micro_size is auto, and 1 is taken here: name a GPU with --gpu, or measure with --probe or --from"
        )
        return 1
    found = largest_micro_size(model, setting, device.memory_bytes)
    notes.append(f"batch.micro_size is auto: {found} blocks of a pass fit into {device.name}; a run tries it")
    return max(1, found)


def with_passes(setting: Setting, job: JobConfig, most: int | None, workers: int) -> Setting:
    """A setting with the passes of a step of the job on so many workers."""
    batch = job.batch
    if most is not None:
        size = batch.even_micro_size(min(most, batch.global_size // workers), workers)
        batch = job.with_micro_size(size).batch
        setting = replace(setting, micro_size=size)
    return replace(setting, world_size=workers, passes=batch.passes_per_step(workers))

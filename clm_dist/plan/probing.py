"""A speed from a probe on this machine."""

from clm_dist.config.job import JobConfig
from clm_dist.devices import Device, device_of
from clm_dist.errors import ConfigError
from clm_dist.plan.architecture import Architecture
from clm_dist.plan.counts import Counts
from clm_dist.plan.speed import Speed, check_measured_on, interval_of_steps
from clm_dist.plan.target import MeasuredSpeed
from clm_dist.quantities import show_bytes

_RAY_BYTES = 230 * 2**20
"""Memory of a worker's process that is Ray's: runs of two models took 226 and 240 MiB more than their probes."""


def probe_speed(
    job: JobConfig, model: Architecture, counts: Counts, seconds: float, device: Device | None
) -> MeasuredSpeed:
    """The speed of a job's workers here, measured for about some seconds.

    Args:
        device: that the plan is for, if it was named.

    Raises:
        ConfigError: the job's own `batch.micro_size` does not fit, or the model cannot be computed; or this machine has
            no GPU, and the plan is for one.
    """
    from clm_dist.train.memory import PassTooLargeError
    from clm_dist.train.probe import Vocabulary, device_here, probe

    here = device_here(job)
    check_measured_on(here, device)
    if device is not None and device != device_of(here):
        raise ConfigError(f"--probe measures on the {here} of this machine, not on {device.name}; leave --gpu out")
    size = "one block" if job.batch.micro_size == "auto" else f"batch.micro_size {job.batch.micro_size}"
    lower = "" if job.batch.micro_size == "auto" else "lower it, "
    try:
        probed = probe(job, Vocabulary(counts.vocabulary), max(1, round(counts.train.blocks)), seconds)
    except PassTooLargeError as error:
        raise ConfigError(
            f"a pass of {size} does not fit here ({error}); {lower}set "
            "train.gradient_checkpointing to true, or shard with cluster.strategy zero2, zero3 or fsdp2",
            field="batch.micro_size",
        ) from None
    memory = probed.memory_bytes
    if memory is not None and probed.device == "CPU":
        # There it is that of the process, which has Ray's code and threads as well in a run.
        memory += _RAY_BYTES
    low, high = interval_of_steps(probed.steps, probed.workers)
    speed = Speed(
        low=low,
        high=high,
        how=f"measured here in {len(probed.steps)} steps on {probed.workers} x {probed.device}",
        eval_tokens_per_s=probed.eval_speed,
        memory_bytes=memory,
        micro_size=probed.micro_size,
    )
    notes = []
    if memory is not None:
        notes.append(f"a worker takes {show_bytes(memory)} here")
    fitting = {size: speed for size, speed in probed.sizes.items() if speed is not None}
    if fitting and len(probed.sizes) > 1:
        best = max(fitting, key=lambda size: fitting[size])
        tried = ", ".join(
            f"{size}: {f'{speed:,.0f}' if speed else 'does not fit'}" for size, speed in probed.sizes.items()
        )
        notes.append(f"tokens/s of a pass by batch.micro_size: {tried}; the fastest is {best}")
    return MeasuredSpeed(speed, device_of(here), here != "CPU", here, probed.workers, probed.workers, tuple(notes))

"""The plan of a job: what it takes on given GPUs, from the sizes of its model and the number of its blocks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from clm_dist.config.job import JobConfig
from clm_dist.devices import Device
from clm_dist.errors import ConfigError
from clm_dist.plan.architecture import Architecture
from clm_dist.plan.choices import Choice, advise, choices_of
from clm_dist.plan.counts import Counts
from clm_dist.plan.disk import Disk, estimate_disk
from clm_dist.plan.duration import Network, assumed_mfu, step_time, token_flops, tokens_per_second
from clm_dist.plan.loss_of_runs import LossOfRuns
from clm_dist.plan.memory import Memory, Setting, estimate_memory, fits_device
from clm_dist.plan.passes import Passes
from clm_dist.plan.speed import Speed
from clm_dist.plan.target import Target
from clm_dist.train.batches import BatchOrder

OUTSIDE_S = 10.0
"""Seconds of a run that its records do not cover: before its driver begins, and after its model is evaluated."""
_OTHER_EVALUATIONS = 2
"""Of the untouched model, and of the written one."""
_SMALL = 50 * 10**6
"""Parameters below which the share of the peak says nothing."""
_FORWARD = 1 / 3
"""Work of a forward pass over that of a pass of training."""
_MUCH = 0.25
"""Share of a step for which workers wait that is worth a word."""


@dataclass(frozen=True)
class Scale:
    """The job on a number of hosts."""

    nodes: int
    workers: int
    passes: int
    """Passes of each worker in a step."""
    memory: Memory
    """Of a worker."""
    fits: bool | None
    """None where the memory of the device is not known."""
    tokens_per_s: float
    speeds: tuple[float, float]
    """Tokens a second at the ends of the interval of the speed."""
    waiting: float
    """Share of a step in which workers wait for what they exchange."""
    efficiency: float
    """Speed over that of as many single workers."""
    seconds: tuple[float, float]
    """Of the whole run, from and to."""
    middle_s: float
    """Of the whole run at `tokens_per_s`."""
    gpu_hours: tuple[float, float]
    cost: tuple[float, float] | None


@dataclass(frozen=True)
class Plan:
    """What a job takes."""

    name: str
    architecture: Architecture
    num_parameters: int
    counts: Counts
    workers: int
    """Of the job itself."""
    steps: int
    steps_per_epoch: int
    evaluations: int
    """Over the whole eval split, the one of the written model among them."""
    tokens: float
    setting: Setting
    choices: tuple[Choice, ...]
    advice: str
    speed: Speed | None
    scales: tuple[Scale, ...]
    too_many: tuple[int, ...]
    """Numbers of hosts with more workers than a step has micro-batches."""
    disk: Disk
    loss: LossOfRuns | None
    """What runs on parts of the data say of the loss; None where none are named."""
    notes: tuple[str, ...]


def make_plan(
    job: JobConfig,
    architecture: Architecture,
    counts: Counts,
    target: Target,
    *,
    speed: Speed | None = None,
    mfu: tuple[float, float] | None = None,
    loss: LossOfRuns | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan of a job.

    Args:
        speed: that was measured; else it follows from the MFU.
        mfu: share of the peak, from and to; else the one that is assumed, where there is one.
    """
    context = architecture.context
    if context is not None and context < job.data.block_size:
        raise ConfigError(
            f"data.block_size is {job.data.block_size}, above the model's context of {context}; set data.block_size to "
            f"{context} or less",
            field="data.block_size",
        )
    workers, device = job.cluster.max_workers, target.device
    order = BatchOrder.of_job(job, max(1, round(counts.train.blocks)))
    tokens = float(order.num_tokens(job.data.block_size))
    at_peak = None
    if device is not None:
        # As a run reckons it, whatever its precision.
        at_peak = tokens * token_flops(architecture, job.data.block_size) / (device.half_flops * workers)
    notes = list(notes)
    plain = Setting.of_job(job, workers, is_gpu=target.is_gpu, seconds_at_peak=at_peak)
    passes = Passes(job, architecture, device, speed.micro_size if speed else None)
    setting = passes.on(workers, plain)
    notes += filter(None, [passes.note()])
    if speed is None and device is not None:
        speed = _speed_of(architecture, setting, device, mfu, notes)
    if job.train.optimizer != "adamw":
        notes.append(f"memory and checkpoints are those of AdamW; train.optimizer {job.train.optimizer} may take other")
    choices = tuple(choices_of(architecture, setting, device))
    evaluations = order.num_due(job.eval.every) + _OTHER_EVALUATIONS
    work = _Work(job, architecture, target, order.num_steps, evaluations * counts.eval.blocks, passes)
    scales = []
    if speed is not None:
        fitting = [n for n in target.nodes if n * target.gpus_per_node <= job.batch.num_micros]
        scales = [_scale(work, setting, speed, nodes) for nodes in fitting]
        if (slowest := max(scales, key=lambda scale: scale.waiting, default=None)) and slowest.waiting > _MUCH:
            notes.append(_advise_waiting(slowest, setting, choices, job))

    def seconds_of(choice: Choice) -> float:
        own = replace(
            setting,
            strategy=choice.strategy,
            offload=choice.offload,
            gradient_checkpointing=choice.gradient_checkpointing,
        )
        return step_time(architecture, own, _rate_of(work, own, setting, speed), _network(target)).total

    return Plan(
        name=job.name,
        architecture=architecture,
        num_parameters=architecture.num_parameters,
        counts=counts,
        workers=workers,
        steps=order.num_steps,
        steps_per_epoch=order.steps_per_epoch,
        evaluations=evaluations,
        tokens=tokens,
        setting=setting,
        choices=choices,
        advice=advise(setting, choices, device, seconds_of),
        speed=speed,
        scales=tuple(scales),
        too_many=tuple(n for n in target.nodes if n * target.gpus_per_node > job.batch.num_micros),
        disk=estimate_disk(
            job,
            architecture.num_parameters,
            num_blocks=counts.train.blocks + counts.eval.blocks,
            vocabulary=counts.vocabulary,
            is_prepared=counts.is_prepared,
        ),
        loss=loss,
        notes=(*counts.notes, *notes),
    )


def _speed_of(
    model: Architecture, setting: Setting, device: Device, mfu: tuple[float, float] | None, notes: list[str]
) -> Speed | None:
    """The speed that follows from an MFU, or from none where none is known."""
    how = "of the peak, as given"
    if mfu is None and setting.precision == "bf16" and not device.has_bf16:
        notes.append(
            f"no time is estimated: {device.name} has no bf16, and computes it in a slow way; set train.precision "
            "to fp16, or say the share of the peak with --mfu"
        )
        return None
    if mfu is None and model.num_parameters < _SMALL:
        notes.append(
            f"no time is estimated: a GPU trains models below {_SMALL // 10**6} million parameters as fast as it is "
            "given work, not as fast as it computes; measure with --probe or --from, or say --mfu"
        )
        return None
    if mfu is None:
        if setting.precision in ("fp32", "tf32"):
            notes.append(
                f"no time is estimated: which share of its peak a GPU reaches in {setting.precision} was not measured; "
                "set train.precision to bf16, or say it with --mfu, or measure with --probe or --from"
            )
            return None
        mfu = assumed_mfu(setting)
        how = "of the peak, assumed from measurements on one H200; --probe or --from measures"
    low, high = (tokens_per_second(model, setting, device, share) for share in mfu)
    share = " to ".join(f"{share * 100:.3g}" for share in dict.fromkeys(mfu)) + " %"
    return Speed(low, high, f"{share} {how}")


@dataclass(frozen=True)
class _Work:
    job: JobConfig
    model: Architecture
    target: Target
    num_steps: int
    eval_blocks: float
    """Of all evaluations together."""
    passes: Passes


def _network(target: Target) -> Network:
    link = target.device.link if target.device else math.inf
    return Network(target.gpus_per_node, link, target.between_nodes)


def _rate_of(work: _Work, setting: Setting, own: Setting, speed: Speed | None) -> float:
    """Tokens a second of a worker in a setting, from those in the job's own, or at a middle MFU where none is known."""
    assert work.target.device
    shares = [sum(assumed_mfu(one)) / 2 for one in (setting, own)]
    rates = [
        tokens_per_second(work.model, one, work.target.device, share)
        for one, share in zip((setting, own), shares, strict=True)
    ]
    return rates[0] if speed is None else speed.middle * rates[0] / rates[1]


def _scale(work: _Work, setting: Setting, speed: Speed, nodes: int) -> Scale:
    job, target = work.job, work.target
    workers = nodes * target.gpus_per_node
    network = _network(target)
    at = work.passes.on(workers, setting)
    tokens = job.batch.global_size * job.data.block_size

    def step_at(rate: float) -> float:
        return step_time(work.model, at, rate, network).total

    def seconds_at(rate: float) -> float:
        eval_rate = rate / speed.middle * (speed.eval_tokens_per_s or speed.middle / _FORWARD)
        evaluations = work.eval_blocks * job.data.block_size / (eval_rate * workers)
        return work.num_steps * step_at(rate) + evaluations + speed.around_s

    memory = estimate_memory(work.model, at)
    middle = step_time(work.model, at, speed.middle, network)
    seconds = (seconds_at(speed.high), seconds_at(speed.low))
    gpu_hours = (seconds[0] * workers / 3600, seconds[1] * workers / 3600)
    rate = tokens / middle.total
    price = target.price
    return Scale(
        nodes=nodes,
        workers=workers,
        passes=at.passes,
        memory=memory,
        fits=None if target.device is None else fits_device(memory, target.device.memory_bytes),
        tokens_per_s=rate,
        speeds=(tokens / step_at(speed.low), tokens / step_at(speed.high)),
        waiting=middle.waiting / middle.total,
        efficiency=rate / (workers * speed.middle),
        seconds=seconds,
        middle_s=seconds_at(speed.middle),
        gpu_hours=gpu_hours,
        cost=None if price is None else (gpu_hours[0] * price, gpu_hours[1] * price),
    )


def _advise_waiting(scale: Scale, setting: Setting, choices: Sequence[Choice], job: JobConfig) -> str:
    """What to do where workers wait for each other."""
    own = next(one for one in choices if one.is_of(setting))
    if scale.nodes == 1:
        what = "a larger batch.global_size, or GPUs with a faster link"
        return f"on one node workers wait for each other in {scale.waiting * 100:.0f} % of a step; less with {what}"
    said = f"on {scale.nodes} nodes workers wait for each other in {scale.waiting * 100:.0f} % of a step; less with "
    if (
        scale.passes > 1
        and job.batch.micro_size != "auto"
        and setting.strategy in ("zero2", "zero3", "fsdp2")
        and (own.most_blocks or 0) > setting.micro_size
    ):
        said += f"a larger batch.micro_size (up to {own.most_blocks}), because every pass exchanges, "
    return f"{said}a larger batch.global_size, or more bandwidth between hosts (--network)"

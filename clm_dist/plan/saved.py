"""The file of a plan, which lies in the directory of its run."""

import time

from clm_dist import __version__
from clm_dist.config.differences import computed_values
from clm_dist.config.job import JobConfig
from clm_dist.files.plan_file import FORMAT, Interval, PlanFile, PlannedSize
from clm_dist.plan.memory import Memory
from clm_dist.plan.page import plan_values
from clm_dist.plan.plan import OUTSIDE_S, Plan, Scale
from clm_dist.plan.speed import Speed
from clm_dist.plan.target import MeasuredSpeed, Target
from clm_dist.train.batches import BatchOrder

_MEMORY_ERROR = 0.1
"""Share by which the memory of a run may differ from that of its plan."""

_START_ERROR, _ASSUMED_START_ERROR = (5.0, 5.0), (10.0, 28.0)
"""Seconds by which the start of a run may be shorter and longer than planned, where it was measured and where not."""


def plan_file(job: JobConfig, plan: Plan, target: Target, measured: MeasuredSpeed | None = None) -> PlanFile:
    """The content of plan.json.

    Args:
        measured: what the speed of the plan is from, where it was measured.
    """
    counts = plan.counts.train
    low, high = (BatchOrder.of_job(job, max(1, round(end))).num_steps for end in (counts.low, counts.high))
    steps: Interval = {"value": plan.steps, "low": low, "high": high}
    expected = plan.loss.expected.loss if plan.loss and plan.loss.expected else None
    device = target.device.name if target.device else measured.name if measured else "CPU"
    return {
        "format": FORMAT,
        "made": time.time(),
        "version": __version__,
        "job": computed_values(job),
        "device": device,
        "workers": plan.workers,
        "price": target.price,
        "steps": steps,
        "evaluations": plan.evaluations,
        "sizes": [_of_scale(job, scale, plan.speed, steps, target, measured) for scale in plan.scales if plan.speed]
        or [_without_speed(job, plan, target)],
        "speed": plan.speed.how if plan.speed else None,
        "loss": {"value": expected.value, "low": expected.low, "high": expected.high} if expected else None,
        "plan": plan_values(plan),
    }


def _of_scale(
    job: JobConfig, scale: Scale, speed: Speed, steps: Interval, target: Target, measured: MeasuredSpeed | None
) -> PlannedSize:
    shorter, longer = _ASSUMED_START_ERROR if speed.start_s is None else _START_ERROR
    # Steps grow with the blocks, and so do the evaluations between them.
    fewest, most = (
        speed.around_s + (seconds - speed.around_s) * end / steps["value"]
        for seconds, end in zip(scale.seconds, (steps["low"], steps["high"]), strict=True)
    )
    ends = (scale.middle_s, fewest - shorter, most + longer)
    seconds = [max(0.0, end - OUTSIDE_S) for end in ends]
    memory = _memory(job, scale.memory, target)
    if measured and measured.speed.memory_bytes and measured.workers == scale.workers:
        memory = _about(measured.speed.memory_bytes)
    return {
        "workers": scale.workers,
        "seconds": {"value": seconds[0], "low": seconds[1], "high": seconds[2]},
        "tokens_per_s": {"value": scale.tokens_per_s, "low": scale.speeds[0], "high": scale.speeds[1]},
        "memory_bytes": memory,
    }


def _without_speed(job: JobConfig, plan: Plan, target: Target) -> PlannedSize:
    own = next(one for one in plan.choices if one.is_of(plan.setting))
    memory = _memory(job, own.memory, target)
    return {"workers": plan.workers, "seconds": None, "tokens_per_s": None, "memory_bytes": memory}


def _memory(job: JobConfig, memory: Memory, target: Target) -> Interval | None:
    """The memory that is computed, where it is that of a run: on a GPU, with AdamW."""
    if not target.is_gpu or job.train.optimizer != "adamw":
        return None
    # A run records what tensors take.
    return _about(memory.total - memory.context)


def _about(memory: float) -> Interval:
    return {"value": memory, "low": memory * (1 - _MEMORY_ERROR), "high": memory * (1 + _MEMORY_ERROR)}

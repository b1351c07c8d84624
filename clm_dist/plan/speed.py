"""How fast a worker trains: assumed from a share of the peak, or measured in a run or in a probe."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clm_dist.devices import Device
from clm_dist.errors import ConfigError
from clm_dist.files.record_types import Record

_START_S = 25.0
"""Seconds of a run before its first step and after its last: Ray, its workers, the model. Measured 20 s for one and two
workers, 53 s for eight on two cores."""
_ENDS_S = 12.0
"""Seconds of a run before its driver begins and after its last step: 10 to 13 s in six runs of small models."""
_GROUPS = 20
_WARM_UP = 0.05
"""Share of the steps of a start, the first ones, that are left out: they also start what the others find started."""
_FLOOR = 0.03
"""The least half-width of an interval, as a share: what one machine differs from itself on another day."""


@dataclass(frozen=True)
class Speed:
    """How fast a worker trains that waits for no other."""

    low: float
    """Tokens a second; the true speed is taken to be between `low` and `high`."""
    high: float
    how: str
    """Where it is from, in words."""
    eval_tokens_per_s: float | None = None
    """Of a worker in an evaluation; None takes three times that of training, whose forward pass is a third of it."""
    start_s: float | None = None
    """Seconds until the first step; None where they were not measured."""
    memory_bytes: float | None = None
    """The most memory that a worker took; None where it was not measured."""
    micro_size: int | None = None
    """Blocks of a pass that were found to be best there; None where they were not looked for."""

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    @property
    def around_s(self) -> float:
        """Seconds of a run before its first step and after its last."""
        return _START_S if self.start_s is None else self.start_s + _ENDS_S


@dataclass(frozen=True)
class Measured:
    """What the records of a run say of its speed."""

    workers: int
    device: str
    num_hosts: int
    low: float
    """Tokens a second of each worker, what they wait for each other with it."""
    high: float
    eval_seconds: tuple[float, int] | None
    """Seconds of all evaluations, and the tokens that they predicted."""
    start_s: float | None
    memory_bytes: float | None
    num_steps: int
    """Steps that it is measured on."""
    micro_size: int | None


def measure(records: Iterable[Record]) -> Measured | None:
    """The speed of a run on what it was started on last; None where it has not trained enough steps there to tell."""
    workers, device, hosts, start_s, micro_size = 1, "CPU", 1, None, None
    starts: list[list[tuple[int, float]]] = [[]]
    seconds, tokens, memory = 0.0, 0, 0
    for record in records:
        if record["kind"] == "start":
            before = workers, device, hosts, micro_size
            workers, device = record["workers"], record["device"]
            hosts = len(set(record.get("hosts", ()))) or 1
            micro_size = record.get("micro_size")
            start_s = record.get("startup", start_s)
            if (workers, device, hosts, micro_size) != before:
                starts, seconds, tokens, memory = [], 0.0, 0, 0
            starts.append([])
        elif record["kind"] == "step":
            starts[-1].append((record["tokens"], record["seconds"]))
            memory = max(memory, record.get("memory_bytes", 0))
        elif record["kind"] == "eval" and "seconds" in record:
            seconds, tokens = seconds + record["seconds"], tokens + record["num_tokens"]
    steps = [step for each in starts for step in each[math.ceil(len(each) * _WARM_UP) :]]
    if len(steps) < 2:
        return None
    low, high = interval_of_steps(steps, workers)
    return Measured(
        workers=workers,
        device=device,
        num_hosts=hosts,
        low=low,
        high=high,
        eval_seconds=(seconds, tokens) if seconds else None,
        start_s=start_s,
        memory_bytes=memory or None,
        num_steps=len(steps),
        micro_size=micro_size,
    )


def interval_of_steps(steps: Sequence[tuple[int, float]], workers: int) -> tuple[float, float]:
    """The interval of the speed of each worker.

    It is that of the speeds of twenty groups of steps: two standard deviations on each side of their mean.

    Args:
        steps: tokens and seconds of each.
    """
    speeds = [tokens / seconds / workers for tokens, seconds in _grouped(steps)]
    mean = statistics.harmonic_mean(speeds)
    spread = 2 * statistics.stdev(speeds) / mean if len(speeds) > 1 else 0.0
    spread = min(max(spread, _FLOOR), 0.9)
    return mean * (1 - spread), mean * (1 + spread)


def _grouped(steps: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Tokens and seconds of consecutive steps together, in twenty groups or fewer."""
    size = math.ceil(len(steps) / _GROUPS)
    groups = (steps[start : start + size] for start in range(0, len(steps), size))
    return [(sum(tokens for tokens, _ in group), sum(seconds for _, seconds in group)) for group in groups]


def check_measured_on(name: str, device: Device | None) -> None:
    """Raise ConfigError where a speed that was measured on a CPU is asked for on a GPU.

    Args:
        name: that the driver gives to what it was measured on; `CPU` for none.
    """
    if device is not None and name == "CPU":
        raise ConfigError(
            f"the speed is measured on a CPU, which says nothing of {device.name}; leave --gpu out, or measure there"
        )

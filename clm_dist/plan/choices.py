"""Ways to lay out the training state of a job, and which of them to take."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from clm_dist.devices import Device
from clm_dist.plan.architecture import Architecture
from clm_dist.plan.memory import Memory, Setting, estimate_memory, fits_device, host_bytes, largest_micro_size

_STRATEGIES = (("ddp", "none"), ("zero1", "none"), ("zero2", "none"), ("zero3", "none"), ("fsdp2", "none"))
_ABOUT_AS_FAST = 0.05
"""Difference of times, as a share, that says nothing."""
_OFFLOADS = (("zero2", "optimizer"), ("zero3", "all"), ("fsdp2", "all"))


@dataclass(frozen=True)
class Choice:
    """A way to lay out the training state, on the job's own number of workers."""

    strategy: str
    offload: str
    gradient_checkpointing: bool
    memory: Memory
    host_bytes: float
    """Of each worker."""
    most_blocks: int | None
    """The largest `batch.micro_size` that fits; None where the device's memory is not known."""
    fits: bool | None
    """Whether the job's own `batch.micro_size` fits."""

    def is_of(self, setting: Setting) -> bool:
        """Whether it is the one of a setting."""
        own = (setting.strategy, setting.offload, setting.gradient_checkpointing)
        return (self.strategy, self.offload, self.gradient_checkpointing) == own


def choices_of(model: Architecture, setting: Setting, device: Device | None) -> list[Choice]:
    """Every strategy, with and without recomputed activations and offload, on the setting's workers."""
    found = []
    for strategy, offload in (*_STRATEGIES, *_OFFLOADS):
        for recomputes in (False, True):
            if setting.precision == "fp16" and strategy == "fsdp2":
                continue
            one = replace(
                setting,
                strategy=strategy,
                offload=offload,
                gradient_checkpointing=recomputes,
            )
            memory = estimate_memory(model, one)
            most = fits = None
            if device is not None:
                most = largest_micro_size(model, one, device.memory_bytes)
                fits = fits_device(memory, device.memory_bytes)
            found.append(Choice(strategy, offload, recomputes, memory, host_bytes(model, one), most, fits))
    return found


def advise(
    setting: Setting, choices: Sequence[Choice], device: Device | None, seconds_of: Callable[[Choice], float]
) -> str:
    """Which strategy to take, and why.

    Args:
        seconds_of: the time of a step, without that of what is offloaded, which is not known.
    """
    own = next(one for one in choices if one.is_of(setting))
    if device is None:
        return "name a GPU with --gpu to see what fits"

    def work(choice: Choice) -> tuple[bool, float]:
        # Of what is about as fast, the first.
        return choice.offload != "none", round(math.log(seconds_of(choice)) / _ABOUT_AS_FAST)

    best = min((one for one in choices if one.fits), key=work, default=None)
    if best is None:
        smaller = min((one for one in choices if one.most_blocks), key=work, default=None)
        if smaller is None:
            return "nothing fits: take a GPU with more memory, more workers, a smaller model or shorter blocks"
        size = f"batch.micro_size {setting.micro_size}"
        return f"{size} fits nowhere; take {describe(smaller)} and batch.micro_size {smaller.most_blocks}"
    if own is best or (own.fits and work(own) == work(best)):
        return f"{describe(own)} fits, and nothing that fits makes shorter steps"
    if own.fits:
        return f"{describe(own)} fits; so does {describe(best)}, which makes shorter steps"
    return f"{describe(own)} does not fit; take {describe(best)}, which makes the shortest steps of what fits"


def describe(choice: Choice) -> str:
    """A choice in words: the values of its fields."""
    said = choice.strategy
    if choice.offload != "none":
        said += f" with cluster.offload {choice.offload}"
    return said + (" with train.gradient_checkpointing" if choice.gradient_checkpointing else "")

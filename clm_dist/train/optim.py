"""The optimizer and its learning rate."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clm_dist.config.job import TrainConfig
from clm_dist.errors import ConfigError
from clm_dist.train.optimizers import build_other, groups_of


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """The job's optimizer over the model's trainable parameters, decayed as the job says."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # ZeRO-3 leaves an empty vector in a parameter's place and keeps its shape beside it.
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters}
    groups = groups_of(parameters, shapes, train)
    if train.optimizer != "adamw":
        return build_other(train, groups)
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    return torch.optim.AdamW(
        groups, lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_epsilon, fused=True
    )


def build_schedule(train: TrainConfig, num_steps: int) -> Callable[[int], float]:
    """The learning rate of a step (the first is 0), as transformers' schedule of that name has it.

    Args:
        num_steps: steps of the run.

    Raises:
        ConfigError: the schedule of `train.schedule_steps` leaves steps of the run in which nothing is learned.
    """
    from transformers import get_scheduler

    run_steps, num_steps = num_steps, train.schedule_steps or num_steps
    # "constant" itself would ignore the warm-up.
    name = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}.get(train.schedule, train.schedule)
    num_warmup = train.num_warmup_steps(num_steps)
    options: dict[str, Any] = {}
    if train.schedule == "wsd":
        num_decay = min(math.ceil(train.decay_ratio * num_steps), max(0, num_steps - num_warmup))
        options = {"num_decay_steps": num_decay, "decay_type": "linear"}
    scheduler = get_scheduler(
        name,
        torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=train.learning_rate),
        num_warmup_steps=num_warmup,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=options,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    if run_steps > num_steps and factor(num_steps) == 0:
        raise ConfigError(
            f"train.schedule_steps {num_steps} is less than the {run_steps} steps of the run, and train.schedule "
            f"{train.schedule} ends at a learning rate of 0: nothing would be learned from there on; raise it, or set "
            "it to null",
            field="train.schedule_steps",
        )
    return lambda step: train.learning_rate * factor(min(step, num_steps))


def describe_change(before: TrainConfig, steps_before: int, now: TrainConfig, num_steps: int, step: int) -> str | None:
    """In words, how a job's learning rate after a step differs from that of the job before it; None where it does not.

    Args:
        step: steps that are trained.
    """
    old, new = build_schedule(before, steps_before)(step), build_schedule(now, num_steps)(step)
    if math.isclose(old, new):
        return None
    changed = f"The learning rate goes on from step {step} with {new:.3g}, not {old:.3g} as in the job before"
    schedule = before.schedule_steps or steps_before
    if schedule == (now.schedule_steps or num_steps):
        return changed
    changed += f": its schedule was for {schedule} steps"
    with contextlib.suppress(ConfigError):
        build_schedule(now.model_copy(update={"schedule_steps": schedule}), num_steps)
        changed += f", which --set train.schedule_steps={schedule} keeps"
    return changed

"""AdamW and its learning rate."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clm_dist.config.job import TrainConfig


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the model's trainable parameters, decayed as the job says."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if train.decay_bias_and_norm:
        groups = [{"params": [p for _, p in parameters], "weight_decay": train.weight_decay}]
    else:
        kept = {True: train.weight_decay, False: 0.0}
        groups = [
            {"params": chosen, "weight_decay": decay}
            for decayed, decay in kept.items()
            if (chosen := [p for name, p in parameters if _is_matrix(name, p) is decayed])
        ]
    return torch.optim.AdamW(
        groups, lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_epsilon, fused=True
    )


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is neither a bias nor a normalisation weight: those are vectors."""
    # ZeRO-3 leaves an empty vector in a parameter's place and keeps its shape beside it.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 2 and not name.endswith(".bias")


def build_schedule(train: TrainConfig, num_steps: int) -> Callable[[int], float]:
    """The learning rate of a step (the first is 0), as transformers' schedule of that name has it."""
    from transformers import get_scheduler

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
    return lambda step: train.learning_rate * factor(step)

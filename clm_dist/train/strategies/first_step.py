"""What the step that is tried before the first has to show of a model, besides that ranks share its gradients."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from clm_dist.errors import ConfigError

_SAME = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
"""The share of a loss by which it may differ on a GPU, where not every sum is rounded the same each time."""


@contextlib.contextmanager
def every_parameter_is_reached(model: nn.Module) -> Iterator[None]:
    """Raise ConfigError where a backward pass inside leaves out a trainable parameter."""
    waiting = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hooks = [
        p.register_post_accumulate_grad_hook(lambda _, name=name: waiting.pop(name, None))  # type: ignore[no-untyped-call]
        for name, p in list(waiting.items())
    ]
    yield
    for hook in hooks:
        hook.remove()
    if waiting:
        more = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
        raise ConfigError(
            f"model: {type(model).__name__} has trainable parameters that no gradient reaches, {min(waiting)}{more}, "
            "and they could not be found before; this model is not supported",
            field="model",
        )


def check_same_each_time(
    model: nn.Module, losses: list[float], precision: str, *, on_gpu: bool, any_rank: Callable[[bool], bool]
) -> None:
    """Raise ConfigError where the losses of one block with one seed differ. Collective.

    Args:
        any_rank: whether something is so on any rank, the same answer on every rank.
    """
    rounding = _SAME[precision] if on_gpu else 0.0
    if any_rank(max(losses) - min(losses) > rounding * abs(losses[0])):
        raise ConfigError(
            f"model: {type(model).__name__} computes another loss of the same block each time, with the same seed "
            "(Reformer, for example, seeds its own dropout by the clock), so a run that is resumed would be another; "
            "set its dropout to 0, or take another model",
            field="model",
        )

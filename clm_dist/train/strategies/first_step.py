"""A step that is tried before the first: ranks share its gradients, which reach every parameter the same each time."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError, RunError
from clm_dist.train.strategies.base import REPORT_FAULT, Strategy

logger = logging.getLogger(__name__)

_SAME = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-3, "fp16": 1e-3}
"""The share of a loss by which it may differ on a GPU, where not every sum is rounded the same each time."""


def check_gradients(strategy: Strategy, job: JobConfig, loss_of: Callable[[nn.Module], Tensor]) -> None:
    """Try a step before any is trained: every trainable parameter has a gradient, and the ranks share it.

    Called before a checkpoint is loaded. A gradient that only rank 0 has, times the number of ranks, must
    come out as the one that all have: without the mean, what a rank's optimizer sees is either too much or nothing.

    Args:
        loss_of: the loss of the same block, on every rank.

    Raises:
        ConfigError: the model has trainable parameters that no gradient reaches, or its loss is another each time.
        RunError: the ranks do not share their gradients.
    """
    passes = min(2, job.batch.passes_per_step(strategy.world_size))

    losses: list[float] = []

    def backward(model: nn.Module, scale: float) -> None:
        loss = loss_of(model)
        losses.append(loss.item())
        strategy.backward(loss * scale)

    def norm(scale: float) -> float:
        for number in range(passes):
            with strategy.one_pass(last=number == passes - 1) as model:
                # An accumulated pass must not be lost, nor one that adds nothing change it.
                backward(model, scale if number == 0 else 0.0)
        return strategy.gradient_norm()

    with _every_parameter_is_reached(strategy.plain_model), strategy.one_pass(last=True) as model:
        backward(model, 1.0)
    strategy.gradient_norm()
    of_one, of_all = norm(float(strategy.world_size) if strategy.rank == 0 else 0.0), norm(1.0)
    _check_same_each_time(
        strategy.plain_model,
        losses,
        job.train.precision,
        on_gpu=strategy.device.type == "cuda",
        any_rank=strategy.any_rank,
    )
    finite = math.isfinite(of_one + of_all)
    # Rounding is all that may differ; bf16 keeps 8 bits.
    shared = finite and math.isclose(of_one, of_all, rel_tol=1e-2) and of_all > 0
    plain = strategy.plain_gradient_norm(loss_of)
    if plain is not None and finite and not math.isclose(of_all, plain, rel_tol=1e-2):
        raise RunError(
            f"the gradient of the first block has norm {of_all:.6g}, and {plain:.6g} in plain torch: something "
            f"scales it. Nothing was trained. {REPORT_FAULT}"
        )
    num_shared, num_finite = strategy.all_reduce([float(shared), float(finite)])
    if num_shared == strategy.world_size:
        return
    if num_finite and of_all == 0:
        raise RunError("the gradient of the first block is 0, so nothing would be trained: take another model")
    if num_finite:
        raise RunError(
            f"the ranks do not share their gradients: one rank's gradient has norm {of_one:.6g}, and {of_all:.6g} "
            f"when all {strategy.world_size} ranks have it. Nothing was trained. {REPORT_FAULT}"
        )
    if job.train.precision != "fp16":
        raise RunError(
            "the gradient of the first block is not finite before anything was trained: the weights of the model "
            "are broken; get them again, or name another model"
        )
    logger.warning("whether the ranks share their gradients could not be seen: they overflow in fp16")


@contextlib.contextmanager
def _every_parameter_is_reached(model: nn.Module) -> Iterator[None]:
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


def _check_same_each_time(
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

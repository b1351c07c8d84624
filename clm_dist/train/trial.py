"""What is tried before the first step.

A prediction depends on the tokens before it alone, every trainable parameter has a gradient that the ranks share, and
documents do not mix.
"""

import numpy as np
import torch
from torch import nn

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError, RunError
from clm_dist.files.blocks import Blocks
from clm_dist.train.forward import check_router_loss, first_pass
from clm_dist.train.mixing import find_future, find_mixing
from clm_dist.train.strategies.base import Strategy
from clm_dist.train.strategies.first_step import check_gradients


def check_training(job: JobConfig, strategy: Strategy, blocks: Blocks, document_end: int | None) -> None:
    """Try what training rests on, and change nothing. Collective.

    Args:
        document_end: the id that ends a document; None without `data.document_mask`.

    Raises:
        ConfigError: the model sees tokens that it is to predict; or see `check_gradients`.
        RunError: the model does not see what `data.document_mask` tells it; or see `check_gradients`.
    """
    _check_sees_the_past_alone(strategy, blocks)
    check_gradients(strategy, job, lambda model: _first_loss(model, job, strategy, blocks))
    if document_end is not None:
        _check_documents_are_apart(job, strategy, blocks, document_end)


def _first_loss(model: nn.Module, job: JobConfig, strategy: Strategy, blocks: Blocks) -> torch.Tensor:
    """The loss of the first block, the same on every rank and each time."""
    # As in training, where activations may be recomputed; dropout is that of the seed.
    model.train()
    torch.manual_seed(job.train.seed)
    ids_BT = strategy.to_device(blocks[np.arange(1)])
    with first_pass(model):
        losses, router_loss = model(ids_BT)
    check_router_loss(model, router_loss)
    loss: torch.Tensor = losses.mean()
    return loss if router_loss is None else loss + router_loss


def _check_sees_the_past_alone(strategy: Strategy, blocks: Blocks) -> None:
    model = strategy.local_model
    with first_pass(model):
        problem = find_future(
            model,
            block_size=blocks.block_size,
            device=strategy.device,
            sharded=strategy.sharded,
            autocast=strategy.autocast,
            any_rank=strategy.any_rank,
        )
    if problem:
        raise ConfigError(problem, field="model")


def _check_documents_are_apart(job: JobConfig, strategy: Strategy, blocks: Blocks, document_end: int) -> None:
    problem = find_mixing(
        strategy.local_model,
        document_end,
        block_size=blocks.block_size,
        device=strategy.device,
        precision=job.train.precision,
        autocast=strategy.autocast,
        any_rank=strategy.any_rank,
    )
    if problem:
        raise RunError(problem)

"""Runs a function in processes that share a torch process group, as torchrun would."""

from collections.abc import Callable
from typing import Any

from clm_dist.train.local import run_ranks


def run_workers(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """What `function(rank, world_size, *arguments)` gives on every rank."""
    return run_ranks(function, world_size, *arguments, preload=["accelerate", "deepspeed", "tests.support.ranks"])

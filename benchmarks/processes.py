"""Real worker processes on this machine, and the heading of a report; what the demonstrations share."""

import logging
import os
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import transformers

from clm_dist.train.local import run_ranks


def run_processes(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """What `function(rank, world_size, *arguments)` gives in every process of a gloo group, one thread each."""
    # Else DeepSpeed warns of the GPU that it does not find.
    os.environ["DS_ACCELERATOR"] = "cpu"
    return run_ranks(_quietly, world_size, function, arguments, preload=["accelerate", "deepspeed", "transformers"])


def _quietly(rank: int, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    # Notes on what the demonstrations do on purpose, from every process.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    return function(rank, world_size, *arguments)


def environment() -> str:
    """Date, machine and versions of a measurement."""
    names = ("torch", "transformers", "accelerate", "deepspeed", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), {versions}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is left-aligned and the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

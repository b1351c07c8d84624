"""Real worker processes on this machine, and the heading of a report; what the demonstrations share."""

import logging
import multiprocessing
import os
import pickle
import platform
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.multiprocessing.spawn import start_processes


def run_processes(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """What `function(rank, world_size, *arguments)` gives in every process of a gloo group, one thread each."""
    with tempfile.TemporaryDirectory() as directory:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # Else DeepSpeed warns of the GPU that it does not find.
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Processes are forked from a server that has imported what they need: that takes longer than their work.
        multiprocessing.set_forkserver_preload(["clm_dist.train.local", "accelerate", "deepspeed", "transformers"])
        start_processes(
            _process, (world_size, port, directory, function, arguments), world_size, start_method="forkserver"
        )  # type: ignore[no-untyped-call]
        return [pickle.loads((Path(directory) / str(rank)).read_bytes()) for rank in range(world_size)]


def _process(
    rank: int, world_size: int, port: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # Notes on what the demonstrations do on purpose, from every process.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    result = function(rank, world_size, *arguments)
    (Path(directory) / str(rank)).write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def forget_accelerate() -> None:
    """Let the next strategy in this process start from no state: Accelerate keeps one a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def environment() -> str:
    """Date, machine and versions of a measurement."""
    names = ("torch", "transformers", "accelerate", "deepspeed", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), {versions}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is left-aligned and the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""Runs a function in processes that share a torch process group, as torchrun would."""

import multiprocessing
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def run_workers(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """What `function(rank, world_size, *arguments)` gives on every rank."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        # Workers are forked from a server that has imported what they need: that takes longer than their work.
        multiprocessing.set_forkserver_preload(
            ["clm_dist.train.local", "accelerate", "deepspeed", "transformers.models.gpt2.modeling_gpt2"]
        )
        start_processes(
            _worker, (world_size, port, directory, function, arguments), world_size, start_method="forkserver"
        )  # type: ignore[no-untyped-call]
        return [pickle.loads((Path(directory) / str(rank)).read_bytes()) for rank in range(world_size)]


def _worker(
    rank: int, world_size: int, port: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
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
    """Accelerate keeps one state a process; the next strategy in it must start from none."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)

"""The loop without Ray: in one plain process, or in processes that share a process group."""

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from clm_dist.config.job import JobConfig
from clm_dist.files.run_dir import RunDir
from clm_dist.train.loop import Outcome, train
from clm_dist.train.messages import Message
from clm_dist.train.recorder import Recorder
from clm_dist.train.session import Session
from clm_dist.train.strategies.environment import forget_accelerate


def train_here(
    job: JobConfig,
    run: RunDir,
    store: Path,
    recorder: Recorder,
    *,
    rank: int = 0,
    world_size: int = 1,
    use_gpu: bool = False,
) -> Outcome:
    """Train with this process as the worker `rank`; rank 0 records. Collective.

    For more than one process the caller has created torch's process group, and chosen the GPU of each.

    Args:
        use_gpu: train on the current GPU, else on the CPU.
    """

    def report(message: Message) -> None:
        messages: Sequence[Message | None] = [message]
        if world_size > 1:
            gathered: list[Message | None] = [None] * world_size
            dist.all_gather_object(gathered, message)
            messages = gathered
        problem: list[Exception | None] = [None]
        if rank == 0:
            try:
                recorder.receive([m for m in messages if m is not None])
            except Exception as error:  # raised below, on every rank: alone, this one would leave the others waiting
                problem = [error]
        if world_size > 1:
            dist.broadcast_object_list(problem)
        if problem[0] is not None:
            raise problem[0]

    session = Session(
        rank=rank,
        world_size=world_size,
        use_gpu=use_gpu,
        num_threads=torch.get_num_threads(),
        run=run,
        store=store,
        report=report,
    )
    try:
        return train(job, session)
    finally:
        forget_accelerate()


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    preload: Sequence[str] = (),
    backend: str = "gloo",
) -> list[Any]:
    """The results of `function(rank, world_size, *arguments)` in the processes of a group, one thread each.

    Args:
        preload: modules that the function needs. Processes are forked from a server that has imported them, because
            that takes longer than short work; the first call says which.
    """
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.set_forkserver_preload(["clm_dist.train.local", *preload])
        own = (world_size, directory, backend, function, arguments)
        start_processes(_rank, own, world_size, start_method="forkserver")  # type: ignore[no-untyped-call]
        return [pickle.loads((Path(directory) / str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    directory: str,
    backend: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    # The ranks meet at a file: a port that was free may be another program's by now.
    dist.init_process_group(backend, init_method=f"file://{directory}/group", rank=rank, world_size=world_size)
    result = function(rank, world_size, *arguments)
    (Path(directory) / str(rank)).write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()

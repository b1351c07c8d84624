"""The loop without Ray: in one plain process, or in processes that share a process group."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from clm_dist.config import JobConfig
from clm_dist.run_dir import RunDir
from clm_dist.train.loop import Outcome, Session, train
from clm_dist.train.record import Message, Recorder


def train_here(
    job: JobConfig, run: RunDir, store: Path, recorder: Recorder, *, rank: int = 0, world_size: int = 1
) -> Outcome:
    """Train on the CPU with this process as the worker `rank`; rank 0 records. Collective.

    For more than one process the caller has created torch's process group.
    """

    def report(message: Message, checkpoint: Path | None, name: str | None) -> None:
        messages: Sequence[Message | None] = [message]
        if world_size > 1:
            gathered: list[Message | None] = [None] * world_size
            dist.all_gather_object(gathered, message)
            messages = gathered
            if checkpoint is not None:
                # Rank 0 chose the name for all.
                names = [name]
                dist.broadcast_object_list(names)
                name = names[0]
        if checkpoint is not None and name is not None:
            shutil.copytree(checkpoint, run.checkpoints / name, dirs_exist_ok=True)
            shutil.rmtree(checkpoint)
            if world_size > 1:
                dist.barrier()
        if rank == 0:
            recorder.receive([m for m in messages if m is not None], name)

    session = Session(
        rank=rank,
        world_size=world_size,
        use_gpu=False,
        num_threads=torch.get_num_threads(),
        run=run,
        store=store,
        report=report,
    )
    return train(job, session)

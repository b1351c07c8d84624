"""The loop without Ray: in one plain process, or in processes that share a process group."""

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

    def report(message: Message) -> None:
        messages: Sequence[Message | None] = [message]
        if world_size > 1:
            gathered: list[Message | None] = [None] * world_size
            dist.all_gather_object(gathered, message)
            messages = gathered
        if rank == 0:
            recorder.receive([m for m in messages if m is not None])

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

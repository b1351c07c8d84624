"""The search for the micro-batch of a job's passes: doubled while it fits and helps, halved where it does not fit."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from clm_dist.config.job import JobConfig
from clm_dist.files.blocks import Blocks
from clm_dist.pretrained.tokenizer import load_tokenizer
from clm_dist.train.batches import BatchOrder
from clm_dist.train.documents import document_end_of
from clm_dist.train.heartbeat import Heart
from clm_dist.train.memory import PassTooLargeError, free_bytes
from clm_dist.train.micro_size import (
    blocks_that_did_not_fit,
    with_blocks_that_fit,
    write_blocks_that_fit,
)
from clm_dist.train.rehearsal import Rehearsal, Tried
from clm_dist.train.session import Session

_BETTER = 1.03
"""A larger micro-batch is taken on a CPU where it is faster by this factor: memory is not what limits its speed."""
_MOST_GROWTH = 16
"""A line through two short passes is not trusted beyond."""
_CLOSE = 8
"""The next is not tried where it is larger by an eighth or less."""
_USED = 0.9
"""Share of what is free that passes may take: some of it is in pieces, or needed for something else."""

Found = dict[int, Tried | None]
"""Steps of passes by their blocks; None where they do not fit."""


class StoppedError(Exception):
    """Raised on every rank at once where a run is asked to stop in the search."""


@dataclass(frozen=True)
class Searched:
    """What a search has tried."""

    found: Found
    job: JobConfig
    limit: float | None
    """Bytes that a worker may take; None where that is not known."""
    on_gpu: bool

    @property
    def best(self) -> int | None:
        """The most blocks that fit, or on a CPU the fastest; None where one does not fit."""
        fits = _fitting(self.found)
        if not fits:
            return None
        return max(fits) if self.on_gpu else max(fits, key=lambda size: fits[size].tokens_per_s)

    def describe(self, size: int) -> str:
        """Why a pass has so many blocks."""
        tried = ", ".join(f"{each}{'' if step else ' (does not fit)'}" for each, step in self.found.items())
        why = self._why_best()
        if size != self.best:
            why = f"which makes as few passes as {self.best}, {why}"
        return f"batch.micro_size: a pass has {size} block{'s' if size > 1 else ''}, {why}; tried {tried}"

    def _why_best(self) -> str:
        if self.best == _most_blocks(self.job):
            return "as many as leave each worker a pass of a step"
        if self.on_gpu:
            return "the most that fit"
        is_last = self.best == max(self.found)
        return "as many as memory allows" if is_last and _is_risky(self.found, self.limit) else "the fastest"


def settle_micro_size(job: JobConfig, session: Session, heart: Heart) -> tuple[JobConfig, str | None]:
    """The job with the blocks of a pass that its run has found, and a line that says so where they are found now.

    Those of `auto` are searched for, and written into the run, which keeps them. Collective.

    Raises:
        PassTooLargeError: a pass does not fit; the next workers try half of its blocks at most.
        StoppedError: the run is asked to stop.
    """
    device = torch.cuda.get_device_name() if session.use_gpu else "CPU"
    known: list[Any] = [job, None]
    if session.rank == 0:
        # Alone: on other nodes a file that is new may not be seen yet.
        known = [with_blocks_that_fit(job, session.run, device), blocks_that_did_not_fit(job, session.run)]
    if session.world_size > 1:
        dist.broadcast_object_list(known)
    job, failed = known
    if job.batch.micro_size != "auto":
        return job, None
    size, note = _search(job, session, heart, failed)
    if session.rank == 0:
        write_blocks_that_fit(job, session.run, size, device)
    return job.with_micro_size(size), note


def _search(job: JobConfig, session: Session, heart: Heart, failed: int | None) -> tuple[int, str]:
    """The blocks that a pass has best here, and a line that says so. Collective.

    Args:
        failed: blocks of a pass that did not fit before; None where all did.
    """
    heart.starts("trying how many blocks a pass may have")
    blocks = Blocks(session.store, "train", shuffled=True)
    order = BatchOrder.of_job(job, len(blocks))
    rehearsal = Rehearsal(
        job,
        load_tokenizer(session.store / "tokenizer"),
        # Also of less data than a step has.
        lambda size: blocks[np.resize(order.global_batch(0), size)],
        num_blocks=len(blocks),
        document_end=document_end_of(session.store) if job.data.document_mask else None,
        rank=session.rank,
        world_size=session.world_size,
        use_gpu=session.use_gpu,
    )
    most = _most_blocks(job)
    if failed:
        most = max(1, min(most, failed // 2))

    def before_try(size: int) -> None:
        heart.starts(f"trying passes of {size} blocks")
        asked = session.asked_to_stop() or (session.rank == 0 and session.run.stop.exists())
        if rehearsal.strategy.any_rank(asked):
            raise StoppedError

    rehearsal.compile(1)
    searched = find_micro_size(rehearsal, first=1, most=most, before_try=before_try)
    problem = rehearsal.problem
    rehearsal.release()
    best = searched.best
    if best is None:
        raise PassTooLargeError(problem, 1)
    size = job.batch.even_micro_size(best, job.cluster.max_workers)
    return size, searched.describe(size)


def _most_blocks(job: JobConfig) -> int:
    """The most blocks of a pass with which every worker has one in a step."""
    return job.batch.global_size // job.cluster.max_workers


def find_micro_size(
    rehearsal: Rehearsal,
    *,
    first: int,
    most: int | None = None,
    deadline: float = float("inf"),
    before_try: Callable[[int], None] = lambda size: None,
) -> Searched:
    """Try passes of more blocks, and fewer. Collective.

    Args:
        most: blocks of a pass; None for as many as leave every worker a pass of a step.
        deadline: of `time.perf_counter`, after which nothing more is tried.
    """
    job, device = rehearsal.job, rehearsal.strategy.device
    on_gpu = device.type == "cuda"
    known = [free for free in rehearsal.strategy.gather(free_bytes(device)) if free is not None]
    limit = _USED * min(known) if known else None
    found: Found = {}
    most = most or _most_blocks(job)
    size: int | None = min(first, most)
    while size is not None:
        before_try(size)
        # In the second pass of a step its gradients are there already; further ones are like it.
        num_passes = min(2, job.with_micro_size(size).batch.passes_per_step(job.cluster.max_workers))
        found[size] = rehearsal.try_step(size, num_passes)
        if rehearsal.strategy.any_rank(time.perf_counter() > deadline):
            break
        size = next_size(found, most, limit, on_gpu=on_gpu)
    return Searched(found, job, limit, on_gpu)


def next_size(found: Found, most: int, limit: float | None, *, on_gpu: bool) -> int | None:
    """The blocks of the next pass to try; None where none is worth it.

    Args:
        limit: bytes that a worker may take; None where it is not known.
    """
    fits = _fitting(found)
    low = max(fits, default=0)
    high = min((size for size, tried in found.items() if tried is None), default=most + 1)
    if not low or high <= most:
        size = (low + high) // 2
    elif on_gpu:
        size = min(most, _MOST_GROWTH * low, _most_within(fits, limit))
    else:
        size = min(most, 2 * low)
        slower = [tried.tokens_per_s for each, tried in fits.items() if each < low]
        # What does not fit there is killed.
        if _is_risky(found, limit) or (slower and fits[low].tokens_per_s < _BETTER * max(slower)):
            return None
    return size if size > low + low // _CLOSE else None


def _is_risky(found: Found, limit: float | None) -> bool:
    """Whether a pass of twice the blocks may take more than there is; it takes less than twice the memory."""
    fits = _fitting(found)
    return limit is not None and bool(fits) and 2 * (fits[max(fits)].memory_bytes or 0) > limit


def _fitting(found: Mapping[int, Tried | None]) -> dict[int, Tried]:
    """Those that fit."""
    return {size: tried for size, tried in found.items() if tried is not None}


def _most_within(fits: Mapping[int, Tried], limit: float | None) -> int:
    """The most blocks that should stay within a limit, by a line through the two largest that fit."""
    *_, before, last = 0, *sorted(fits)
    if limit is None or not before:
        return 2 * last
    last_bytes, before_bytes = fits[last].memory_bytes or 0, fits[before].memory_bytes or 0
    each = (last_bytes - before_bytes) / (last - before)
    return last + int((limit - last_bytes) / each) if each > 0 else _MOST_GROWTH * last

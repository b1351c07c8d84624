"""Measures the speed and the memory of a job's passes on this machine, with blocks of random ids; trains nothing."""

import math
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from clm_dist.config.job import JobConfig
from clm_dist.errors import ClmDistError, first_line
from clm_dist.train.local import run_ranks
from clm_dist.train.memory import Gauge, PassTooLargeError
from clm_dist.train.micro_search import Found, find_micro_size
from clm_dist.train.model import set_matrix_products
from clm_dist.train.rehearsal import Rehearsal
from clm_dist.train.strategies.environment import forget_accelerate, set_up_worker

_LEAST_STEPS, _MOST_STEPS = 3, 200
_SHARE_OF_SEARCH = 0.4
"""Of the time, in which other sizes of a micro-batch are tried."""


@dataclass(frozen=True)
class Probed:
    """What a probe measured. Speeds are tokens a second of each worker."""

    workers: int
    device: str
    micro_size: int
    """Blocks of a pass: those of the job, or where they are `auto`, those that were found."""
    steps: tuple[tuple[int, float], ...]
    """Tokens, of all workers, and seconds of each step of the job."""
    eval_speed: float
    memory_bytes: int | None
    """The most that a worker took."""
    sizes: dict[int, float | None]
    """The speed with other micro-batches, in blocks; None where a pass does not fit."""


@dataclass(frozen=True)
class Vocabulary:
    """What a model with random weights takes of a tokenizer that is not loaded."""

    size: int
    """One more than the highest id."""
    bos_token_id: int = 0
    eos_token_id: int = 0

    def get_vocab(self) -> dict[str, int]:
        return {"": self.size - 1}


def passes_of(job: JobConfig) -> list[int]:
    """Blocks of each pass of a worker in a step of the job, however many workers are measured."""
    workers, batch = job.cluster.max_workers, job.batch
    sizes = [batch.known_micro_size] * batch.passes_per_step(workers)
    if workers == 1:
        # Of several, others compute a full pass beside a short one.
        sizes[-1] = batch.global_size - sum(sizes[:-1])
    return sizes


def device_here(job: JobConfig) -> str:
    """Name of the GPU that a worker of a job takes on this machine; `CPU` where it takes none."""
    takes_one = torch.cuda.is_available() and job.cluster.gpus_per_worker != 0
    return torch.cuda.get_device_name(0) if takes_one else "CPU"


def probe(job: JobConfig, vocabulary: Vocabulary, num_blocks: int, seconds: float) -> Probed:
    """Compute steps of a job for about some seconds, in as many processes as there are workers, or on one GPU.

    Args:
        num_blocks: of the train split.

    Raises:
        ConfigError: the model cannot be built or computed.
        PassTooLargeError: a pass of the job's micro-batch does not fit.
    """
    use_gpu = device_here(job) != "CPU"
    workers = 1 if use_gpu else job.cluster.max_workers
    backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
    arguments = job.model_dump(), vocabulary, num_blocks, seconds, use_gpu
    try:
        found = run_ranks(_measure, workers, *arguments, preload=["transformers"], backend=backend)
    except ProcessExitedException as error:
        # The system ends a process that takes more memory than there is.
        raise PassTooLargeError(first_line(error)) from None
    # An error that is raised in a process would reach the others as a traceback.
    if problem := next((each for each in found if isinstance(each, Exception)), None):
        raise problem
    first: Probed = found[0]
    return first


def _measure(
    rank: int,
    world_size: int,
    values: dict[str, Any],
    vocabulary: Vocabulary,
    num_blocks: int,
    seconds: float,
    use_gpu: bool,
) -> Probed | PassTooLargeError | ClmDistError:
    job = JobConfig.model_validate(values)
    # As Ray sets it in its workers; Accelerate warns where it is not set.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    set_up_worker(
        rank=rank,
        world_size=world_size,
        use_gpu=use_gpu,
        num_threads=max(1, math.floor(job.cluster.cpus_per_worker)),
        compiles=bool(job.train.compile),
    )
    set_matrix_products(job.train.precision)
    try:
        rehearsal = Rehearsal(
            job,
            vocabulary,
            # Another computation would be that of all-equal ids: their embedding is read once.
            lambda size: np.random.default_rng(0).integers(0, rehearsal.vocabulary, (size, job.data.block_size)),
            num_blocks=num_blocks,
            document_end=None,
            rank=rank,
            world_size=world_size,
            use_gpu=use_gpu,
        )
        return _measure_steps(rehearsal, seconds)
    except (PassTooLargeError, ClmDistError) as error:
        return error
    finally:
        forget_accelerate()


def _measure_steps(rehearsal: Rehearsal, seconds: float) -> Probed:
    job, strategy = rehearsal.job, rehearsal.strategy
    rehearsal.compile(job.batch.known_micro_size)
    gauge, memory = Gauge(strategy.device), 0

    def step() -> float:
        nonlocal memory
        taken = rehearsal.step(sizes)
        memory = max(memory, gauge.read() or 0)
        return taken

    found: Found = {}
    if job.batch.micro_size == "auto":
        searched = find_micro_size(rehearsal, first=1)
        found, best = searched.found, searched.best
        if best is None:
            raise PassTooLargeError(rehearsal.problem)
        job = job.with_micro_size(job.batch.even_micro_size(best, job.cluster.max_workers))
        rehearsal.take_size(job.batch.known_micro_size)
        rehearsal.forget_peak()
    sizes = passes_of(job)
    began = time.perf_counter()
    step()
    first = rehearsal.agreed(step())
    left = max(0.0, seconds * (1 - _SHARE_OF_SEARCH) - (time.perf_counter() - began))
    count = min(max(_LEAST_STEPS, int(rehearsal.agreed(left) / first)), _MOST_STEPS)
    tokens = sum(sizes) * job.data.block_size * strategy.world_size
    steps = tuple((tokens, step()) for _ in range(count))
    evaluated = rehearsal.evaluate(job.eval.micro_size)
    taken = memory or None
    if not found and not rehearsal.compiled:
        # Compiled, each would be compiled for itself.
        until = time.perf_counter() + _SHARE_OF_SEARCH * seconds
        most = job.batch.global_size // strategy.world_size
        found = find_micro_size(rehearsal, first=job.batch.known_micro_size, most=most, deadline=until).found
    return Probed(
        workers=strategy.world_size,
        device=rehearsal.throughput.device_name,
        micro_size=job.batch.known_micro_size,
        steps=steps,
        eval_speed=evaluated,
        memory_bytes=taken,
        sizes={size: tried.tokens_per_s if tried else None for size, tried in sorted(found.items())},
    )

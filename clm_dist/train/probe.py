"""Measures the speed and the memory of a job's passes on this machine, with blocks of random ids; trains nothing."""

import gc
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from clm_dist.config.job import JobConfig
from clm_dist.errors import ClmDistError, first_line
from clm_dist.train.batches import BatchOrder
from clm_dist.train.compiling import reproducible, try_compiling
from clm_dist.train.forward import WithLoss, block_losses
from clm_dist.train.local import run_ranks
from clm_dist.train.memory import Gauge, PassTooLargeError, of_a_pass
from clm_dist.train.model import build_model, load_config, recompute_activations, set_matrix_products
from clm_dist.train.optim import build_optimizer
from clm_dist.train.strategies.base import Strategy
from clm_dist.train.strategies.build import build_strategy
from clm_dist.train.strategies.environment import forget_accelerate, set_up_worker
from clm_dist.train.throughput import Throughput

_LEAST_STEPS, _MOST_STEPS = 3, 200
_SHARE_OF_SEARCH = 0.4
"""Of the time, in which other sizes of a micro-batch are tried."""
_BETTER = 1.03
"""A larger micro-batch is kept on a CPU where it is faster by this factor."""
_RATE = 1e-9
"""Learning rate: the optimizer does all of its work, and no weight goes anywhere."""


@dataclass(frozen=True)
class Probed:
    """What a probe measured. Speeds are tokens a second of each worker."""

    workers: int
    device: str
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
    sizes = [batch.micro_size] * batch.passes_per_step(workers)
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
        return _Probe(job, vocabulary, rank, world_size, num_blocks, use_gpu).run(seconds)
    except (PassTooLargeError, ClmDistError) as error:
        return error
    finally:
        forget_accelerate()


class _Probe:
    """A job's model under its strategy, and steps of it."""

    def __init__(
        self, job: JobConfig, vocabulary: Vocabulary, rank: int, world_size: int, num_blocks: int, use_gpu: bool
    ) -> None:
        self.job = job
        self.strategy: Strategy = build_strategy(job, rank=rank, world_size=world_size, use_gpu=use_gpu)
        config = load_config(job, vocabulary)
        config.use_cache = False
        torch.manual_seed(job.train.seed)
        with self.strategy.whole_models():
            model = build_model(config)
        if job.train.gradient_checkpointing:
            recompute_activations(model)
        self.throughput = Throughput.of_model(model, job.data.block_size, self.strategy)
        self.vocabulary = config.get_text_config().vocab_size
        self.strategy.prepare(WithLoss(model), lambda prepared: build_optimizer(prepared, job.train))
        self.order = BatchOrder.of_job(job, num_blocks)
        self.memory = 0

    def run(self, seconds: float) -> Probed:
        job, strategy = self.job, self.strategy
        size, sizes_of_passes = job.batch.micro_size, passes_of(job)
        with of_a_pass():
            self.compilation = try_compiling(
                job,
                strategy,
                self._blocks(size),
                None,
                seconds_at_peak=self.throughput.seconds_at_peak(self.order.num_tokens(job.data.block_size)),
            )
        strategy.model.train()
        began = time.perf_counter()
        with of_a_pass():
            self._step(sizes_of_passes)
            first = self._agreed(self._step(sizes_of_passes))
        left = max(0.0, seconds * (1 - _SHARE_OF_SEARCH) - (time.perf_counter() - began))
        count = min(max(_LEAST_STEPS, int(self._agreed(left) / first)), _MOST_STEPS)
        tokens = sum(sizes_of_passes) * job.data.block_size * strategy.world_size
        steps = [(tokens, self._step(sizes_of_passes)) for _ in range(count)]
        evaluated = self._evaluate(job.eval.micro_size)
        memory = self.memory
        sizes = self._search(size, _SHARE_OF_SEARCH * seconds)
        return Probed(
            workers=strategy.world_size,
            device=self.throughput.device_name,
            steps=tuple(steps),
            eval_speed=evaluated,
            memory_bytes=memory or None,
            sizes=sizes,
        )

    def _step(self, sizes: Sequence[int]) -> float:
        """One step on random blocks. Return its seconds. Collective."""
        strategy = self.strategy
        began = time.perf_counter()
        loss_sum = torch.zeros((), dtype=torch.float64, device=strategy.device)
        for number, size in enumerate(sizes, 1):
            ids_BT = strategy.to_device(self._blocks(size))
            compiled = reproducible(self.compilation.compiled)
            with of_a_pass(), compiled, strategy.one_pass(last=number == len(sizes)) as model:
                losses = block_losses(model, ids_BT, None)
                strategy.backward(losses.sum() / losses.numel())
            loss_sum += losses.detach().double().sum()
        _, *sums = strategy.all_reduce([], [loss_sum, *strategy.shared_figures()])
        strategy.check_shared(sums)
        strategy.step(_RATE)
        if strategy.device.type == "cuda":
            torch.cuda.synchronize(strategy.device)
        self.memory = max(self.memory, Gauge(strategy.device).read() or 0)
        return time.perf_counter() - began

    def _evaluate(self, size: int) -> float:
        """Tokens a second of forward passes. Collective."""
        strategy = self.strategy
        model = strategy.local_model
        model.eval()
        times = []
        for _ in range(1 + _LEAST_STEPS):
            began = time.perf_counter()
            with torch.no_grad(), strategy.autocast():
                float(block_losses(model, strategy.to_device(self._blocks(size)), None).double().sum())
            times.append(time.perf_counter() - began)
        model.train()
        return size * self.job.data.block_size / (sum(times[1:]) / _LEAST_STEPS)

    def _search(self, own: int, seconds: float) -> dict[int, float | None]:
        """The speed of other micro-batches: doubled while that helps or fits, then halved between. Collective."""
        found: dict[int, float | None] = {}
        if self.compilation.compiled:
            # Each shape would be compiled for itself.
            return found
        deadline = time.perf_counter() + seconds
        most = self.order.global_size // self.strategy.world_size
        size, best = own, 0.0
        low, high = own, most + 1
        while low < high - 1 or not found:
            speed = self._try(size)
            found[size] = speed
            if speed is None:
                high = size
            else:
                low = size
                if self.strategy.device.type == "cpu" and speed < best * _BETTER:
                    # Memory is not the limit there.
                    break
                best = max(best, speed)
            if self.strategy.any_rank(time.perf_counter() > deadline):
                break
            size = min(2 * low, most) if high > most else (low + high) // 2
            if size in found:
                break
        return dict(sorted(found.items()))

    def _try(self, size: int) -> float | None:
        try:
            self._step([size])
            speed = size * self.job.data.block_size / self._agreed(self._step([size]))
            fits = True
        except PassTooLargeError:
            speed, fits = 0.0, False
            self.strategy.optimizer.zero_grad()
            gc.collect()
            if self.strategy.device.type == "cuda":
                torch.cuda.empty_cache()
        # Where ranks wait for each other, one that has no memory ends the others as well.
        return None if self.strategy.any_rank(not fits) else speed

    def _agreed(self, value: float) -> float:
        """The mean over the ranks of a value that they must have alike. Collective."""
        return self.strategy.all_reduce([value])[0] / self.strategy.world_size

    def _blocks(self, size: int) -> npt.NDArray[np.int64]:
        # Another computation would be that of all-equal ids: their embedding is read once.
        shape = (size, self.job.data.block_size)
        return np.random.default_rng(0).integers(0, self.vocabulary, shape)

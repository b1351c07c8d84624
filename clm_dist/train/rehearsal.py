"""Steps of a job that are measured on this machine and train nothing."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clm_dist.config.job import JobConfig
from clm_dist.pretrained.tokenizer import num_ids
from clm_dist.train.batches import BatchOrder
from clm_dist.train.compiling import reproducible, try_compiling
from clm_dist.train.forward import WithLoss, block_losses
from clm_dist.train.memory import PassTooLargeError, Peak, of_a_pass
from clm_dist.train.model import build_model, load_config, recompute_activations
from clm_dist.train.optim import build_optimizer
from clm_dist.train.strategies.base import Strategy
from clm_dist.train.strategies.build import build_strategy
from clm_dist.train.strategies.environment import forget_accelerate
from clm_dist.train.throughput import Throughput
from clm_dist.train.unused import find_unused, freeze

_RATE = 1e-9
"""Learning rate: the optimizer does all of its work, and no weight goes anywhere."""
_NUM_EVALUATIONS = 3
_MOST_REPEATS, _ENOUGH_S = 5, 1.0
"""Steps of a try, and seconds after which there are no more."""


@dataclass(frozen=True)
class Tried:
    """A step of passes of one size."""

    tokens_per_s: float
    """Of each worker."""
    memory_bytes: int | None
    """The most that a worker took until its gradients were there, once the optimizer has its state; None where the
    system does not say. It grows in a line with the blocks."""


class Rehearsal:
    """A model of a job's configuration with random weights, under the job's strategy, and steps of it.

    Every method is collective unless it says otherwise.

    Args:
        tokenizer: of whose size a model without weights is.
        num_blocks: of the train split.
        take_blocks: gives so many blocks, (B, T), the same on every rank.
        document_end: the id that ends a document; None without `data.document_mask`.
    """

    def __init__(
        self,
        job: JobConfig,
        tokenizer: Any,
        take_blocks: Callable[[int], npt.NDArray[np.int64]],
        *,
        num_blocks: int,
        document_end: int | None,
        rank: int,
        world_size: int,
        use_gpu: bool,
    ) -> None:
        self.job = job
        self._take_blocks, self._document_end = take_blocks, document_end
        self._rank, self._world_size, self._use_gpu = rank, world_size, use_gpu
        self._config = load_config(job, tokenizer)
        self._config.use_cache = False
        text = self._config.get_text_config()
        if job.model.resize:
            text.vocab_size = max(text.vocab_size, num_ids(tokenizer))
        self.vocabulary: int = text.vocab_size
        self._unused = find_unused(self._config, job.data.block_size)
        self.order = BatchOrder.of_job(job, num_blocks)
        self.compiled = False
        self._build()
        self._peak = Peak(self.strategy.device)
        self._pass_bytes: int | None = None
        self.problem = ""
        """Why the last pass did not fit that did not."""

    def _build(self) -> None:
        job = self.job
        self.strategy: Strategy = build_strategy(
            job, rank=self._rank, world_size=self._world_size, use_gpu=self._use_gpu
        )
        torch.manual_seed(job.train.seed)
        with self.strategy.whole_models():
            model = build_model(self._config)
        freeze(model, self._unused)
        if job.train.gradient_checkpointing:
            recompute_activations(model)
        self.throughput = Throughput.of_model(model, job.data.block_size, self.strategy)
        self.strategy.prepare(WithLoss(model), lambda prepared: build_optimizer(prepared, job.train))
        self.strategy.model.train()

    def compile(self, size: int) -> None:
        """Compile passes of so many blocks, if the job's are."""
        seconds = self.throughput.seconds_at_peak(self.order.num_tokens(self.job.data.block_size))
        with of_a_pass():
            compilation = try_compiling(
                self.job, self.strategy, self._take_blocks(size), self._document_end, seconds_at_peak=seconds
            )
        self.compiled = compilation.compiled
        self.strategy.model.train()

    def step(self, sizes: Sequence[int]) -> float:
        """A step of a pass of each size. Return its seconds."""
        strategy = self.strategy
        began = time.perf_counter()
        loss_sum = torch.zeros((), dtype=torch.float64, device=strategy.device)
        for number, size in enumerate(sizes, 1):
            ids_BT = strategy.to_device(self._take_blocks(size))
            with of_a_pass(), reproducible(self.compiled), strategy.one_pass(last=number == len(sizes)) as model:
                losses = block_losses(model, ids_BT, self._document_end)
                strategy.backward(losses.sum() / losses.numel())
            loss_sum += losses.detach().double().sum()
        self._pass_bytes = self._peak.read()
        _, *sums = strategy.all_reduce([], [loss_sum, *strategy.shared_figures()])
        strategy.check_shared(sums)
        with of_a_pass():
            # The optimizer makes its state in the first.
            strategy.step(_RATE)
        if strategy.device.type == "cuda":
            torch.cuda.synchronize(strategy.device)
        return time.perf_counter() - began

    def take_size(self, size: int) -> None:
        """Compile passes of so many blocks from now on, where they are compiled."""
        if self.compiled:
            # One function is compiled for a few shapes at most.
            torch.compiler.reset()
            self.strategy.with_loss.compile_for((size, self.job.data.block_size))

    def forget_peak(self) -> None:
        """Let the most memory that is read from now on be that from now on. Not collective."""
        self._peak.reset()

    def try_step(self, size: int, num_passes: int) -> Tried | None:
        """Measure a step of passes of so many blocks; None where it does not fit.

        Raises:
            PassTooLargeError: it does not fit on this rank, where others may now wait for it.
        """
        fits = True
        sizes = [size] * num_passes
        try:
            self.take_size(size)
            # In the first much is allocated, and may be compiled.
            self.step(sizes)
            times: list[float] = []
            while len(times) < _MOST_REPEATS and sum(times) < _ENOUGH_S:
                # What an update takes does not grow with the blocks.
                self.forget_peak()
                times.append(self.agreed(self.step(sizes)))
        except PassTooLargeError as error:
            self.problem = str(error)
            if self.strategy.world_size > 1:
                raise PassTooLargeError(self.problem, size) from None
            fits = False
        if not fits:
            # A strategy is not whole after half a pass; outside, so that the error holds none of its tensors.
            self._start_again()
            return None
        memory = max((each for each in self.strategy.gather(self._pass_bytes) if each is not None), default=None)
        # Others on the machine make some slower.
        return Tried(sum(sizes) * self.job.data.block_size / min(times), memory)

    def _start_again(self) -> None:
        self.strategy.release()
        forget_accelerate()
        self._build()
        if self.compiled:
            self.strategy.compile_when_called((1, self.job.data.block_size))

    def evaluate(self, size: int) -> float:
        """Tokens a second of forward passes."""
        strategy = self.strategy
        model = strategy.local_model
        model.eval()
        times = []
        for _ in range(1 + _NUM_EVALUATIONS):
            began = time.perf_counter()
            with torch.no_grad(), strategy.autocast():
                float(block_losses(model, strategy.to_device(self._take_blocks(size)), None).double().sum())
            times.append(time.perf_counter() - began)
        model.train()
        return size * self.job.data.block_size / (sum(times[1:]) / _NUM_EVALUATIONS)

    def agreed(self, seconds: float) -> float:
        """The mean over the ranks, the same on each."""
        # Whole numbers, so that their sum is the same in whatever order a backend adds.
        microseconds = float(round(1e6 * seconds))
        return self.strategy.all_reduce([microseconds])[0] / (1e6 * self.strategy.world_size)

    def release(self) -> None:
        """Give its memory back, and let another strategy be built in this process."""
        self.strategy.release()
        forget_accelerate()
        if self.compiled:
            torch.compiler.reset()
        self.forget_peak()

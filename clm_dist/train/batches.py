"""Which blocks a worker computes in a step.

Six blocks, global batches of 4, micro-batches of 2, one epoch; `p` is the epoch's permutation:

    step 0: blocks p0 p1 | p2 p3      micro-batches 0 and 1
    step 1: blocks p4 p5              micro-batch 0; a last short batch is used, not dropped

One worker computes micro-batches 0 and 1 in two passes; of two workers, worker 0 computes micro-batch 0 and worker 1
micro-batch 1. In step 1 worker 1 has none: it repeats micro-batch 0 with weight 0, because sharded strategies need
every rank in every pass. Which blocks a step has depends on the number of workers no more than their order does.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clm_dist.config.job import Every, JobConfig
from clm_dist.files.blocks import Blocks
from clm_dist.train.order import permute


@dataclass(frozen=True)
class MicroBatch:
    """The blocks of one pass."""

    index: int
    """Place in the global batch; seeds dropout."""
    blocks: npt.NDArray[np.int64]
    counts: bool
    """False for a repeat that only keeps the ranks in step."""


@dataclass(frozen=True)
class BatchOrder:
    """Global batches of every step of a run, by arithmetic on the step."""

    num_blocks: int
    global_size: int
    micro_size: int
    epochs: int
    max_steps: int | None
    seed: int

    @classmethod
    def of_job(cls, job: JobConfig, num_blocks: int) -> "BatchOrder":
        batch, train = job.batch, job.train
        return cls(num_blocks, batch.global_size, batch.known_micro_size, train.epochs, train.max_steps, train.seed)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_blocks // self.global_size)

    @property
    def num_steps(self) -> int:
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def num_tokens(self, block_size: int) -> int:
        """Tokens of all steps, about: the last batch of an epoch may be short."""
        return self.num_steps * min(self.global_size, self.num_blocks) * block_size

    def num_due(self, every: Every) -> int:
        """How often something is due in a run; at its last step it always is."""
        each = self.steps_per_epoch if every == "epoch" else every
        return -(-self.num_steps // each)

    def epoch(self, step: int) -> float:
        """Epochs that are done after `step` steps."""
        return step / self.steps_per_epoch

    def global_batch(self, step: int) -> npt.NDArray[np.int64]:
        """Block numbers of a step (the first is 0), (at most global_size,)."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.global_size
        places = np.arange(start, min(start + self.global_size, self.num_blocks))
        return permute(places, self.num_blocks, self.seed, epoch)

    def micro_batches(self, blocks: npt.NDArray[np.int64], rank: int, world_size: int) -> Iterator[MicroBatch]:
        """This rank's passes of a global batch; every rank has equally many, in short batches too."""
        num_micros = -(-self.global_size // self.micro_size)
        for number in range(-(-num_micros // world_size)):
            index = number * world_size + rank
            own = blocks[index * self.micro_size : (index + 1) * self.micro_size]
            if len(own):
                yield MicroBatch(index, own, counts=True)
            else:
                yield MicroBatch(index, blocks[: self.micro_size], counts=False)


@dataclass(frozen=True)
class StepPasses:
    """What one rank computes of a step."""

    step: int
    num_blocks: int
    """Of the global batch, over all ranks."""
    micros: list[MicroBatch]


class Feed:
    """The passes of one rank, step after step; the system reads the blocks of the next step during each."""

    def __init__(self, order: BatchOrder, blocks: Blocks, rank: int, world_size: int) -> None:
        self._order, self._blocks = order, blocks
        self._rank, self._world_size = rank, world_size
        self._ahead: StepPasses | None = None

    def take(self, step: int) -> StepPasses:
        """The passes of a step; the first is 0."""
        passes = self._ahead if self._ahead and self._ahead.step == step else self._passes_of(step)
        if step + 1 < self._order.num_steps:
            self._ahead = self._passes_of(step + 1)
            for micro in self._ahead.micros:
                self._blocks.will_need(micro.blocks)
        return passes

    def _passes_of(self, step: int) -> StepPasses:
        batch = self._order.global_batch(step)
        return StepPasses(step, len(batch), list(self._order.micro_batches(batch, self._rank, self._world_size)))


def block_checksum(numbers: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> int:
    """Checksum of blocks and their tokens: the sum of a CRC-32 of each, so that the ranks' sums add up in any order.

    Args:
        numbers: of the blocks, (B,).
        ids: their tokens, (B, T).
    """
    return sum(zlib.crc32(row.tobytes(), int(number) & 0xFFFFFFFF) for number, row in zip(numbers, ids, strict=True))


def pass_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of a pass's dropout: the same whichever rank computes it, and after a resume."""
    # The 1 keeps it apart from the keys of the order: a SeedSequence takes trailing zeros for nothing.
    return int(np.random.SeedSequence((1, seed, step, micro_batch)).generate_state(1, np.uint64)[0] >> np.uint64(1))

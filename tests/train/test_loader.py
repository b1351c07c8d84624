"""Which blocks a worker computes."""

from typing import ClassVar, cast

import numpy as np
import numpy.typing as npt
import pytest

from clm_dist.files.blocks import Blocks
from clm_dist.train.batches import BatchOrder, Feed

ORDER = BatchOrder(num_blocks=101, global_size=24, micro_size=2, epochs=3, max_steps=None, seed=7)


def test_steps_and_epochs() -> None:
    assert (ORDER.steps_per_epoch, ORDER.num_steps, ORDER.epoch(5), ORDER.epoch(10)) == (5, 15, 1.0, 2.0)
    assert BatchOrder(101, 24, 2, 3, 7, 7).num_steps == 7
    assert BatchOrder(101, 24, 2, 3, 99, 7).num_steps == 15


def test_an_epoch_uses_every_block_once_and_its_last_short_batch_too() -> None:
    for epoch in range(3):
        batches = [ORDER.global_batch(epoch * 5 + step) for step in range(5)]
        assert [len(batch) for batch in batches] == [24, 24, 24, 24, 5]
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(101))
    assert not np.array_equal(ORDER.global_batch(0), ORDER.global_batch(5))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_cover_the_global_batch_once_in_equally_many_passes(world_size: int) -> None:
    for step in range(5):
        by_rank = [list(ORDER.micro_batches(ORDER.global_batch(step), rank, world_size)) for rank in range(world_size)]
        assert {len(micros) for micros in by_rank} == {12 // world_size}
        counted = sorted((m for micros in by_rank for m in micros if m.counts), key=lambda m: m.index)
        blocks = np.concatenate([micro.blocks for micro in counted])
        # The same micro-batches with the same numbers at every number of workers.
        assert np.array_equal(blocks, ORDER.global_batch(step))
        assert [micro.index for micro in counted] == list(range(len(counted)))


def test_a_rank_without_blocks_repeats_some_that_do_not_count() -> None:
    (last,) = ORDER.micro_batches(ORDER.global_batch(4), rank=11, world_size=12)
    assert not last.counts
    assert len(last.blocks) == 2


def test_a_rank_takes_its_passes_and_the_system_reads_those_of_the_next_step() -> None:
    class Seen:
        asked: ClassVar[list[list[int]]] = []

        def will_need(self, indices: npt.NDArray[np.int64]) -> None:
            self.asked.append(indices.tolist())

    feed = Feed(ORDER, cast(Blocks, Seen()), rank=1, world_size=2)

    def expected(step: int) -> list[list[int]]:
        micros = ORDER.micro_batches(ORDER.global_batch(step), 1, 2)
        return [micro.blocks.tolist() for micro in micros]

    # In order, and after a step that is gone back to.
    for step in (0, 1, 2, 1, 4, 14):
        Seen.asked.clear()
        passes = feed.take(step)
        assert (passes.step, passes.num_blocks) == (step, len(ORDER.global_batch(step)))
        assert [micro.blocks.tolist() for micro in passes.micros] == expected(step)
        assert Seen.asked == (expected(step + 1) if step < ORDER.num_steps - 1 else [])

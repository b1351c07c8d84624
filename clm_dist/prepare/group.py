"""Token streams to blocks."""

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from clm_dist.files.shards import Ids


def blocks_of(partitions: Iterable[Ids], block_size: int, grouping: Literal["carry", "guide"]) -> Iterator[Ids]:
    """Blocks of shape (n, block_size) from the token streams of consecutive partitions.

    `carry` goes on with a partition's remainder in the next, so only the last tail is dropped; `guide` drops the
    remainder of every partition, as the guide's `group_texts` does with each batch of 1,000 records.
    """
    rest: Ids | None = None
    for ids in partitions:
        if rest is not None and len(rest):
            ids = np.concatenate([rest, ids])
        num_blocks = len(ids) // block_size
        yield ids[: num_blocks * block_size].reshape(num_blocks, block_size)
        if grouping == "carry":
            rest = ids[num_blocks * block_size :]

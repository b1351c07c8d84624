"""All partitions of a source, encoded: several at a time, in their order, and none of them twice."""

import time
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from clm_dist.config.data import DataConfig
from clm_dist.files.stores import PARTIAL_SUFFIX
from clm_dist.prepare.encoded import Encoded, Recipe, encode_partition, write_encoded
from clm_dist.prepare.encoding import Encoding
from clm_dist.prepare.partition import Partition
from clm_dist.prepare.partitions import read_partition
from clm_dist.prepare.pools import in_order, open_pool
from clm_dist.prepare.sources import Source
from clm_dist.progress import Progress

PARTITION_BYTES = 16 * 2**20
# With fewer partitions than that the work is done before Ray's workers have started.
_FEW_PARTITIONS = 3


@dataclass(frozen=True)
class Effort:
    """How a preparation is run; the shards do not depend on it."""

    num_tasks: int | None = None
    """Tasks at once; None takes as many as there are CPUs."""
    partition_bytes: int = PARTITION_BYTES
    """Size of a partition in the source. Each task holds a few times as much."""


def count_records(source: Source, effort: Effort) -> list[int]:
    """How many records the partitions have, up to the first that the slice takes where that is known before."""
    counts: list[int] = []
    with open_pool(effort.num_tasks, is_small=True) as pool:
        partitions = source.partitions(effort.partition_bytes)
        for _, count in in_order(pool, partitions, lambda each: pool.submit(_num_records, each, source.data)):
            counts.append(count)
            if not source.slice.is_relative and sum(counts) > source.slice.start:
                break
    return counts


def _num_records(partition: Partition, data: DataConfig) -> int:
    return len(read_partition(partition, data))


def encode_partitions(
    source: Source,
    encoding: Encoding,
    engine: str,
    work: Path,
    progress: Progress,
    effort: Effort,
) -> list[Encoded]:
    """All partitions that the source's rows lie in, encoded; those that are there already are not made again."""
    partitions = enumerate(source.partitions(effort.partition_bytes))
    first = list(islice(partitions, _FEW_PARTITIONS))
    display = _Display(progress, source)
    prefix = "eval-" if source.is_eval else ""
    encoded: list[Encoded] = []
    num_records = 0
    stop = source.slice.stop
    with open_pool(effort.num_tasks, is_small=len(first) < _FEW_PARTITIONS) as pool:
        recipe = pool.share(Recipe(source.data, encoding, engine, parallel=pool.num_tasks == 1))

        def path_of(index: int) -> Path:
            return work / f"{prefix}{effort.partition_bytes}-{index:06d}{PARTIAL_SUFFIX}"

        def begin(item: tuple[int, Partition]) -> Any:
            index, partition = item
            if (done := Encoded.open(path_of(index), encoding.dtype)) is not None:
                return lambda: done
            # At least the records of the partitions before are not this one's.
            most = None if stop is None else stop - num_records
            return pool.submit(encode_partition, partition, recipe, most)

        for (index, partition), result in in_order(pool, chain(first, partitions), begin):
            if not isinstance(result, Encoded):
                result = write_encoded(path_of(index), result, encoding.dtype)
                display.log(index, partition, result)
            encoded.append(result)
            num_records += result.stats.num_records
            display.update(index, partition)
            if stop is not None and num_records >= stop:
                break
    return encoded


class _Display:
    """The display of the partitions as they are encoded."""

    def __init__(self, progress: Progress, source: Source) -> None:
        self._progress = progress
        self._total = None if source.num_bytes is None else max(1, source.num_bytes >> 20)
        self._what = "eval partition" if source.is_eval else "partition"
        self._began = time.monotonic()
        self._source_bytes = self._text_bytes = self._tokens = 0
        progress.start("Tokenising the eval split" if source.is_eval else "Tokenising", total=self._total, unit="MiB")

    def log(self, index: int, partition: Partition, made: Encoded) -> None:
        """Count a partition that was encoded now."""
        stats = made.stats
        self._text_bytes += stats.num_text_bytes
        self._tokens += stats.num_tokens
        self._progress.log(
            f"{self._what} {index}: {stats.num_records:,} records, {stats.num_text_bytes / 1e6:,.2f} MB of text, "
            f"{stats.num_tokens:,} tokens with {stats.engine} ({partition.where})"
        )

    def update(self, index: int, partition: Partition) -> None:
        self._source_bytes += partition.num_bytes
        seconds = time.monotonic() - self._began
        figures = {
            "rate": f"{self._text_bytes / 1e6 / seconds:,.1f} MB/s",
            "tokens_per_s": f"{self._tokens / seconds:,.0f}",
        }
        self._progress.update(self._source_bytes >> 20, partitions=f"{index + 1:,}", **figures)

"""Pieces of a source that stand for all of it, for an estimate of its tokens.

A source is read in pieces, whose sizes are all in the same unit, whatever that is: bytes of a file, or of the columns
that are read of a table. Each piece that is sampled stands for a stratum: itself and the pieces up to the next one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clm_dist.errors import ConfigError
from clm_dist.prepare.partition import Partition
from clm_dist.prepare.partitions import read_partition
from clm_dist.prepare.sources import Source

CHUNKS, CHUNK_BYTES = 32, 1 << 16
"""A sample has between this many and twice as many pieces; of each so many bytes are read."""
MOST_READ = 1 << 28
"""Bytes of a source that is read from its beginning, after which the sample ends."""
_FEW_RECORDS = 32
"""With fewer the sample is taken from the beginning, in one piece after the other: documents are larger than pieces."""
_UNKNOWN = 0.5
"""Error of an estimate from a single piece, as a share."""


@dataclass(frozen=True)
class Stratum:
    """A piece that is sampled, and what it stands for."""

    table: pa.Table
    """Records of the piece."""
    size: float
    """Of the piece, in the unit of the source."""
    stands_for: float
    """Size of all that it stands for; or the number of records, where they are counted."""
    is_counted: bool = False


@dataclass(frozen=True)
class Sample:
    """The strata of a source, in its order."""

    source: Source
    strata: list[Stratum]
    is_beginning: bool
    """Whether they are from its beginning only."""

    @property
    def num_records(self) -> int:
        return sum(len(stratum.table) for stratum in self.strata)


def sample_of(source: Source) -> Sample:
    """A sample of the rows that a job takes of a source.

    Raises:
        ConfigError: the source has no end that is known, and the job takes no number of rows.
        DataError: a record is broken.
    """
    rows = source.slice
    if not rows.is_relative and rows.stop is not None:
        return _counted(source, rows.start, rows.stop)
    if source.num_bytes is None:
        raise ConfigError(
            f"{source.where} has no size that is known before all of it is read; take rows, such as "
            "data.split=train[:5000], or prepare first",
            field="data.split",
        )
    spread = _spread(source, source.num_bytes)
    return spread if spread.num_records >= _FEW_RECORDS else _counted(source, 0, None)


def _spread(source: Source, num_bytes: int) -> Sample:
    """Pieces spread evenly over a source. Each time there are too many, every other one is left out."""
    kept: list[tuple[Partition, float]] = []
    stride, passed, is_beginning = 1, 0.0, False
    for number, piece in enumerate(source.partitions(max(CHUNK_BYTES, num_bytes // (8 * CHUNKS)))):
        if number % stride == 0:
            kept.append((piece, passed))
        if len(kept) > 2 * CHUNKS:
            kept, stride = kept[::2], 2 * stride
        passed += piece.num_bytes
        if isinstance(piece.content, pa.Buffer) and passed >= MOST_READ:
            # It is compressed, and its size is that of the file.
            is_beginning = True
            break
    ends = [begin for _, begin in kept[1:]] + [passed]
    factor = num_bytes / passed if is_beginning else 1.0
    strata = [
        Stratum(*_begin_of(piece, source), stands_for=(end - begin) * factor)
        for (piece, begin), end in zip(kept, ends, strict=True)
    ]
    return Sample(source, strata, is_beginning)


def _begin_of(piece: Partition, source: Source) -> tuple[pa.Table, float]:
    """Records from the beginning of a piece, and their size."""
    size = float(piece.num_bytes)
    if piece.content is None and piece.file is not None and piece.file.kind in ("json", "text"):
        stop = min(piece.stop, piece.start + CHUNK_BYTES)
        piece, size = replace(piece, stop=stop), float(stop - piece.start)
    table = read_partition(piece, source.data)
    share = min(1.0, CHUNK_BYTES / size) if size else 1.0
    rows = max(1, math.ceil(len(table) * share))
    return (table.slice(0, rows), size * rows / len(table)) if len(table) else (table, size)


def _counted(source: Source, start: int, stop: int | None) -> Sample:
    """Pieces of the rows from `start` on, which are counted up to `stop`, or until enough is read."""
    kept: list[tuple[pa.Table, int]] = []
    stride, number, records, passed, is_beginning = 1, 0, 0, 0.0, False
    for piece in source.partitions(4 * CHUNK_BYTES):
        table = read_partition(piece, source.data)
        first, end = max(records, start), records + len(table) if stop is None else min(records + len(table), stop)
        if end > first:
            if number % stride == 0:
                kept.append((table.slice(first - records, end - first), 0))
            if len(kept) > 2 * CHUNKS:
                kept = [(one, of_one + of_other) for (one, of_one), (_, of_other) in _pairs(kept)]
                stride *= 2
            one, of_one = kept[-1]
            kept[-1] = (one, of_one + end - first)
            number += 1
        records += len(table)
        passed += piece.num_bytes
        if stop is not None and records >= stop:
            break
        if passed >= MOST_READ:
            is_beginning = True
            break
    factor = 1.0
    if is_beginning and kept:
        taken = sum(of_one for _, of_one in kept)
        if stop is not None:
            factor = (stop - start) / taken
        elif source.num_bytes is not None:
            factor = source.num_bytes / passed
    strata = [Stratum(table, float(len(table)), of_table * factor, is_counted=True) for table, of_table in kept]
    return Sample(source, strata, is_beginning)


def _pairs(kept: list[tuple[pa.Table, int]]) -> Iterator[tuple[tuple[pa.Table, int], tuple[pa.Table, int]]]:
    for index in range(0, len(kept), 2):
        yield kept[index], kept[index + 1] if index + 1 < len(kept) else (kept[index][0], 0)


@dataclass(frozen=True)
class Total:
    """Tokens and records of the rows that a job takes."""

    tokens: float
    error: float
    """Standard error of the tokens."""
    records: float


def total_of(sample: Sample, num_tokens: list[int]) -> Total:
    """The tokens and records of a source from its sample.

    Each stratum has the tokens of its piece in proportion. The error is that of a ratio estimate (Cochran 1977,
    "Sampling Techniques", section 6.4) over the strata, less what is read of them.

    Args:
        num_tokens: of each piece.
    """
    strata, rows = sample.strata, sample.source.slice
    tokens, found, size, weight = (
        np.array(each, float)
        for each in zip(
            *((n, len(s.table), s.size, s.stands_for) for n, s in zip(num_tokens, strata, strict=True)), strict=True
        )
    )
    grown = np.divide(weight, size, out=np.zeros_like(weight), where=size > 0)
    all_tokens, all_records = tokens * grown, found * grown
    is_counted = all(stratum.is_counted for stratum in strata)
    taken = np.ones_like(weight) if is_counted else _taken(all_records, sample)
    by_rows = is_counted or rows.start > 0 or rows.is_relative
    number, base = all_tokens * taken, (all_records if by_rows else weight) * taken
    residuals = number - number.sum() / base.sum() * base
    used = int(np.count_nonzero(base))
    left = max(0.0, 1 - (size * taken).sum() / (weight * taken).sum())
    error = math.sqrt(used / (used - 1) * (residuals**2).sum() * left) if used > 1 else _UNKNOWN * number.sum() * left
    return Total(float(number.sum()), float(error), float((all_records * taken).sum()))


def _taken(records: npt.NDArray[np.float64], sample: Sample) -> npt.NDArray[np.float64]:
    """The share of each stratum that the job's slice takes, (num_strata,)."""
    rows = sample.source.slice
    ends = np.cumsum(records)
    if rows.is_relative:
        rows = rows.of_total(max(1, round(ends[-1])))
    stop = ends[-1] if rows.stop is None else rows.stop
    inside = np.clip(np.minimum(ends, stop) - np.maximum(ends - records, rows.start), 0, None)
    taken: npt.NDArray[np.float64] = np.divide(inside, records, out=np.zeros_like(records), where=records > 0)
    return taken

"""How many blocks a job has: from its store where they are prepared, else estimated from a sample of its records."""

import math
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from clm_dist.config.data import DataConfig
from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError
from clm_dist.files.hashes import HashMemory
from clm_dist.files.stores import Store, Stores
from clm_dist.prepare import pipeline
from clm_dist.prepare.data_file import is_url
from clm_dist.prepare.documents import documents_of, no_text
from clm_dist.prepare.encode import Effort
from clm_dist.prepare.encoding import Encoding, completed
from clm_dist.prepare.engines import Reference
from clm_dist.prepare.files import find_files
from clm_dist.prepare.partition import Partition
from clm_dist.prepare.partitions import read_partition
from clm_dist.prepare.sources import Source, open_sources
from clm_dist.prepare.splits import GUIDE_RECORDS
from clm_dist.prepare.tokenizer_training import train_tokenizer
from clm_dist.pretrained.tokenizer import load_tokenizer, locate_tokenizer, num_ids
from clm_dist.progress import nowhere, open_progress

_CHUNKS, _CHUNK_BYTES = 32, 1 << 16
"""A sample is that many pieces of a source, spread evenly over it, of that size."""
_MOST_READ = 1 << 28
"""Bytes of a source that has to be read from its beginning, after which the sample ends."""
_MOST_HASHED = 1 << 30
"""Bytes of files that are read to see whether their blocks are prepared."""
_SMALL_BYTES = 1 << 21
"""Of a source that is prepared to count its blocks."""
_OF_OTHER_TOKENIZER = 0.03
"""By how much the tokens of a tokenizer that is trained on a sample differ from those of the job's own, as a share."""
_LEVEL = 0.95


@dataclass(frozen=True)
class Count:
    """A number of blocks, and the interval in which it is taken to be."""

    blocks: float
    low: float
    high: float


@dataclass(frozen=True)
class Counts:
    """The blocks of a job."""

    train: Count
    eval: Count
    is_exact: bool
    """Whether they are known."""
    is_prepared: bool
    """Whether they are on disk already."""
    how: str
    """Where the numbers are from, in words."""
    vocabulary: int
    """One more than the tokenizer's highest id."""
    notes: tuple[str, ...] = ()


def count_blocks(job: JobConfig, stores: Stores) -> Counts:
    """The blocks of a job.

    Raises:
        ConfigError, DataError: its data or its tokenizer is not reachable or broken.
        HubError, StorageError: the Hub or a storage is away.
    """
    if (store := _prepared(job, stores)) is not None:
        return _known(store, f"prepared in {store.local}", is_prepared=True)
    sources = list(open_sources(job.data))
    sizes = [source.num_bytes for source in sources if source.num_bytes is not None]
    if len(sizes) == len(sources) and sum(sizes) <= _SMALL_BYTES:
        with tempfile.TemporaryDirectory() as directory, open_progress(nowhere) as progress:
            made = pipeline.prepare(job, Stores.at(directory, directory), progress, Effort(num_tasks=1))
            return _known(made, "counted in a preparation that is thrown away", is_prepared=False)
    return _estimated(job, sources)


def _known(store: Store, how: str, *, is_prepared: bool) -> Counts:
    counts = (float(split.num_blocks) for split in (store.manifest().splits[name] for name in ("train", "eval")))
    train, evaluated = (Count(number, number, number) for number in counts)
    vocabulary = num_ids(Tokenizer.from_file(str(store.local / "tokenizer" / "tokenizer.json")))
    return Counts(train, evaluated, True, is_prepared, how, vocabulary)


def _prepared(job: JobConfig, stores: Stores) -> Store | None:
    """A job's store; None where it is not on this machine."""
    if not stores.local.is_dir() or _num_unread(job, stores.known_sources()) > _MOST_HASHED:
        return None
    store = pipeline.resolve(job, stores).store
    return store if store.is_here else None


def _num_unread(job: JobConfig, known: HashMemory) -> int:
    """Bytes of local files whose hash is not known yet."""
    if job.data.source != "files":
        return 0
    files = [Path(file.name) for file in find_files(job.data).files if not is_url(file.name)]
    return sum(file.stat().st_size for file in files if known.get(file) is None)


@dataclass(frozen=True)
class _Sample:
    """What was read of a source."""

    source: Source
    num_bytes: list[int]
    """Bytes of the source that each piece stands for."""
    num_records: list[int]
    num_tokens: list[int]
    sizes: list[int]
    """Tokens of each document."""


def _estimated(job: JobConfig, sources: list[Source]) -> Counts:
    pieces = [_pieces(source) for source in sources]
    tables = [
        [(size, read_partition(piece, source.data)) for size, piece in found]
        for source, (found, _) in zip(sources, pieces, strict=True)
    ]
    tokenizer, notes = _tokenizer(job, [table for _, table in tables[0]])
    encoding = Encoding.of_tokenizer(tokenizer, job.data)
    engine = Reference(encoding.tokenizer_json)
    counts = []
    for source, found, (_, is_beginning) in zip(sources, tables, pieces, strict=True):
        sample = _Sample(source, [], [], [], [])
        for size, table in found:
            documents = documents_of(table, source.data)
            tokens = completed(engine.encode(documents.texts, parallel=True), encoding)
            sample.num_bytes.append(size)
            sample.num_records.append(len(table))
            sample.num_tokens.append(len(tokens.ids))
            sample.sizes.extend(np.diff(tokens.offsets).tolist())
        if not sum(sample.num_tokens):
            raise no_text(job, sum(sample.num_records), source.where)
        counts.append(_tokens_of(sample, 0.0 if job.tokenizer.train is None else _OF_OTHER_TOKENIZER))
        if is_beginning:
            notes.append(f"{source.where} can only be read from its beginning, so the sample is from there")
    if job.data.deduplicate:
        notes.append("documents that data.deduplicate takes out are counted")
    if job.data.has_own_eval:
        train, evaluated = counts[0], counts[1]
    else:
        train, evaluated = _split(counts[0], job.data)
    num_records = sum(len(table) for found in tables for _, table in found)
    return Counts(
        train=train.blocks(job),
        eval=evaluated.blocks(job),
        is_exact=False,
        is_prepared=False,
        how=f"estimated from {num_records:,} of its records",
        vocabulary=num_ids(tokenizer),
        notes=tuple(notes),
    )


def _pieces(source: Source) -> tuple[list[tuple[int, Partition]], bool]:
    """Pieces of a source with the bytes that they stand for, and whether they are from its beginning only."""
    total = source.num_bytes
    if total is None and source.slice.stop is None:
        raise ConfigError(
            f"{source.where} has no size that is known before all of it is read; take rows, such as "
            "data.split=train[:5000], or prepare first",
            field="data.split",
        )
    size = max(_CHUNK_BYTES, (total or 0) // (8 * _CHUNKS))
    found: list[tuple[int, Partition]] = []
    step = (total or _MOST_READ) / _CHUNKS
    passed = 0
    for piece in source.partitions(size):
        is_due = passed + piece.num_bytes >= step * (len(found) + 0.5)
        if is_due:
            found.append(_begin_of(piece))
        passed += piece.num_bytes
        is_read = piece.content is not None and piece.file is not None
        if (is_read or total is None) and passed >= _MOST_READ:
            return found, True
    return found, total is None


def _begin_of(piece: Partition) -> tuple[int, Partition]:
    """The beginning of a piece, and the bytes that it stands for."""
    if piece.content is None and piece.file is not None and piece.file.kind in ("json", "text"):
        stop = min(piece.stop, piece.start + _CHUNK_BYTES)
        return stop - piece.start, replace(piece, stop=stop)
    return piece.num_bytes, piece


def _tokenizer(job: JobConfig, tables: list[Any]) -> tuple[Any, list[str]]:
    """The job's tokenizer, or one that is trained on the sample, and what is to be said of it."""
    if job.tokenizer.train is None:
        assert job.tokenizer_path is not None
        field, revision = ("tokenizer.path", None) if job.tokenizer.path else ("model.path", job.model.revision)
        return load_tokenizer(locate_tokenizer(job.tokenizer_path, field, revision)), []
    with tempfile.TemporaryDirectory() as directory:
        texts = (text for table in tables for text in documents_of(table, job.data).texts.to_pylist())
        train_tokenizer(texts, job.tokenizer.train, Path(directory))
        return load_tokenizer(directory), ["the tokenizer is trained on the sample, so it is not quite the job's"]


@dataclass(frozen=True)
class _Tokens:
    """Tokens of records, with the standard error of their number."""

    number: float
    error: float
    num_records: float
    sizes: tuple[float, float]
    """Mean and standard deviation of the tokens of a record."""

    def blocks(self, job: JobConfig) -> Count:
        size = job.data.block_size
        # The guide drops half a block of each thousand records on average.
        dropped = size / 2 * max(1.0, self.num_records / GUIDE_RECORDS) if job.data.grouping == "guide" else size / 2
        number = max(0.0, self.number - dropped)
        spread = statistics.NormalDist().inv_cdf((1 + _LEVEL) / 2) * self.error
        return Count(number / size, max(0.0, number - spread) / size, (number + spread) / size)


def _tokens_of(sample: _Sample, systematic: float) -> _Tokens:
    """The tokens of all records that a job takes of a source: a ratio estimate (Cochran 1977, "Sampling Techniques",
    chapter 6) of the tokens a byte, or a record, of the pieces.

    Args:
        systematic: error that does not fall with the size of the sample, as a share.
    """
    tokens, sizes, records = (
        np.array(each, float) for each in (sample.num_tokens, sample.num_bytes, sample.num_records)
    )
    total = sample.source.num_bytes
    all_records = math.inf if total is None else records.sum() / sizes.sum() * total
    rows = sample.source.slice
    if rows.is_relative:
        rows = rows.of_total(round(all_records))
    stop = all_records if rows.stop is None else min(rows.stop, all_records)
    taken = max(0.0, stop - rows.start)
    is_sliced = rows.start > 0 or rows.stop is not None
    base, number = (records, taken) if is_sliced else (sizes, float(total or 0))
    ratio = tokens.sum() / base.sum()
    variance = ((tokens - ratio * base) ** 2).sum() / max(1, len(tokens) - 1) * len(tokens)
    error = math.hypot(number / base.sum() * math.sqrt(variance), systematic * ratio * number)
    lengths = np.array(sample.sizes, float)
    return _Tokens(float(ratio * number), float(error), float(taken), (float(lengths.mean()), float(lengths.std())))


def _split(tokens: _Tokens, data: DataConfig) -> tuple[_Tokens, _Tokens]:
    """The tokens of the train and of the eval split, between which records are dealt out."""
    fraction = data.eval_fraction
    mean, deviation = tokens.sizes
    # By hash the number of records differs as well.
    spread = deviation**2 + (mean**2 if data.splits_by_hash else 0)
    drawn = math.sqrt(tokens.num_records * fraction * (1 - fraction) * spread)

    def part(share: float) -> _Tokens:
        error = math.hypot(share * tokens.error, drawn)
        return _Tokens(share * tokens.number, error, share * tokens.num_records, tokens.sizes)

    return part(1 - fraction), part(fraction)

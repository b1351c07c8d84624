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
from clm_dist.files.blocks import Manifest
from clm_dist.files.hashes import HashMemory
from clm_dist.files.stores import Stores
from clm_dist.prepare import pipeline
from clm_dist.prepare.data_file import is_url
from clm_dist.prepare.documents import documents_of, no_text
from clm_dist.prepare.encoding import Encoding, completed
from clm_dist.prepare.engines import Reference
from clm_dist.prepare.files import find_files
from clm_dist.prepare.partition import Partition
from clm_dist.prepare.partitions import read_partition
from clm_dist.prepare.sources import Source, open_sources
from clm_dist.prepare.splits import GUIDE_RECORDS
from clm_dist.prepare.tokenizer_training import train_tokenizer
from clm_dist.pretrained.tokenizer import load_tokenizer, locate_tokenizer, num_ids

_CHUNKS, _CHUNK_BYTES = 32, 1 << 16
"""A sample is that many pieces of a source, spread evenly over it, of that size."""
_MOST_READ = 1 << 28
"""Bytes of a source that has to be read from its beginning, after which the sample ends."""
_MOST_HASHED = 1 << 30
"""Bytes of files that are read to see whether their blocks are prepared."""
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
    """Whether they are prepared, and so known."""
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
    store = _prepared(job, stores)
    if store is not None:
        manifest, directory = store
        counts = (float(manifest.splits[name].num_blocks) for name in ("train", "eval"))
        train, evaluated = (Count(number, number, number) for number in counts)
        vocabulary = num_ids(Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json")))
        return Counts(train, evaluated, True, f"prepared in {directory}", vocabulary)
    return _estimated(job)


def _prepared(job: JobConfig, stores: Stores) -> tuple[Manifest, Path] | None:
    """The manifest and the directory of a job's store; None where it is not on this machine."""
    if not stores.local.is_dir() or _num_unread(job, stores.known_sources()) > _MOST_HASHED:
        return None
    store = pipeline.resolve(job, stores).store
    return (store.manifest(), store.local) if store.is_here else None


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
    is_whole: bool
    is_beginning: bool
    """Whether it is from the beginning of the source only."""


def _estimated(job: JobConfig) -> Counts:
    sources = list(open_sources(job.data))
    pieces = [_pieces(source) for source in sources]
    tables = [
        [(size, read_partition(piece, source.data)) for size, piece in found]
        for source, (found, _, _) in zip(sources, pieces, strict=True)
    ]
    tokenizer, notes = _tokenizer(job, [table for _, table in tables[0]], is_whole=pieces[0][1])
    encoding = Encoding.of_tokenizer(tokenizer, job.data)
    engine = Reference(encoding.tokenizer_json)
    counts = []
    for source, found, (_, is_whole, is_beginning) in zip(sources, tables, pieces, strict=True):
        sample = _Sample(source, [], [], [], [], is_whole, is_beginning)
        for size, table in found:
            documents = documents_of(table, source.data)
            tokens = completed(engine.encode(documents.texts, parallel=True), encoding)
            sample.num_bytes.append(size)
            sample.num_records.append(len(table))
            sample.num_tokens.append(len(tokens.ids))
            sample.sizes.extend(np.diff(tokens.offsets).tolist())
        if not sum(sample.num_tokens):
            raise no_text(job, sum(sample.num_records), source.where)
        counts.append(_tokens_of(sample))
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
        how=f"estimated from {num_records:,} of its records",
        vocabulary=num_ids(tokenizer),
        notes=tuple(notes),
    )


def _pieces(source: Source) -> tuple[list[tuple[int, Partition]], bool, bool]:
    """Pieces of a source with the bytes that they stand for; whether they are all of it; whether only its beginning."""
    total = source.num_bytes
    if total is None and source.slice.stop is None:
        raise ConfigError(
            f"{source.where} has no size that is known before all of it is read; take rows, such as "
            "data.split=train[:5000], or prepare first",
            field="data.split",
        )
    if total is not None and total <= _CHUNKS * _CHUNK_BYTES:
        return [(piece.num_bytes, piece) for piece in source.partitions(_CHUNK_BYTES)], True, False
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
            return found, False, True
    return found, False, total is None


def _begin_of(piece: Partition) -> tuple[int, Partition]:
    """The beginning of a piece, and the bytes that it stands for."""
    if piece.content is None and piece.file is not None and piece.file.kind in ("json", "text"):
        stop = min(piece.stop, piece.start + _CHUNK_BYTES)
        return stop - piece.start, replace(piece, stop=stop)
    return piece.num_bytes, piece


def _tokenizer(job: JobConfig, tables: list[Any], *, is_whole: bool) -> tuple[Any, list[str]]:
    """The job's tokenizer, or one that is trained on the sample, and what is to be said of it."""
    if job.tokenizer.train is None:
        assert job.tokenizer_path is not None
        field, revision = ("tokenizer.path", None) if job.tokenizer.path else ("model.path", job.model.revision)
        return load_tokenizer(locate_tokenizer(job.tokenizer_path, field, revision)), []
    with tempfile.TemporaryDirectory() as directory:
        texts = (text for table in tables for text in documents_of(table, job.data).texts.to_pylist())
        train_tokenizer(texts, job.tokenizer.train, Path(directory))
        said = [] if is_whole else ["the tokenizer is trained on the sample, which it fits a little better than all"]
        return load_tokenizer(directory), said


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


def _tokens_of(sample: _Sample) -> _Tokens:
    """The tokens of all records that a job takes of a source: a ratio estimate (Cochran 1977, "Sampling Techniques",
    chapter 6) of the tokens a byte, or a record, of the pieces.
    """
    tokens, sizes, records = (
        np.array(each, float) for each in (sample.num_tokens, sample.num_bytes, sample.num_records)
    )
    total = sample.source.num_bytes
    all_records = records.sum() if sample.is_whole else records.sum() / sizes.sum() * (total or math.inf)
    rows = sample.source.slice
    if rows.is_relative:
        rows = rows.of_total(round(all_records))
    stop = all_records if rows.stop is None else min(rows.stop, all_records)
    taken = max(0.0, stop - rows.start)
    is_sliced = rows.start > 0 or rows.stop is not None
    base, number = (records, taken) if is_sliced else (sizes, float(total or 0))
    ratio = tokens.sum() / base.sum()
    if sample.is_whole and not is_sliced:
        error = 0.0
    else:
        count = len(tokens)
        variance = ((tokens - ratio * base) ** 2).sum() / max(1, count - 1) * count
        error = float(number / base.sum() * math.sqrt(variance))
    lengths = np.array(sample.sizes, float)
    return _Tokens(float(ratio * number), error, float(taken), (float(lengths.mean()), float(lengths.std())))


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

"""How many blocks a job has: from its store where they are prepared, else estimated from a sample of its records."""

import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from clm_dist.config.data import DataConfig
from clm_dist.config.job import JobConfig
from clm_dist.files.hashes import HashMemory
from clm_dist.files.stores import Store, Stores
from clm_dist.plan.sampling import sample_of, total_of
from clm_dist.prepare import pipeline
from clm_dist.prepare.data_file import is_url
from clm_dist.prepare.documents import documents_of, no_text
from clm_dist.prepare.encode import Effort
from clm_dist.prepare.encoding import Encoding, completed
from clm_dist.prepare.engines import Reference
from clm_dist.prepare.files import find_files
from clm_dist.prepare.sources import Source, open_sources
from clm_dist.prepare.splits import GUIDE_RECORDS
from clm_dist.prepare.tokenizer_training import train_tokenizer
from clm_dist.pretrained.tokenizer import load_tokenizer, locate_tokenizer, num_ids
from clm_dist.progress import nowhere, open_progress

_MOST_HASHED = 1 << 30
"""Bytes of files that are read to see whether their blocks are prepared."""
_SMALL_BYTES = 1 << 24
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
    if _is_small(sources):
        with tempfile.TemporaryDirectory() as directory, open_progress(nowhere) as progress:
            made = pipeline.prepare(job, Stores.at(directory, directory), progress, Effort(num_tasks=1))
            return _known(made, "counted in a preparation that is thrown away", is_prepared=False)
    return _estimated(job, sources)


def _is_small(sources: list[Source]) -> bool:
    """Whether little is to be read; a file may be compressed."""
    passed = 0
    for source in sources:
        if source.num_bytes is None or source.num_bytes > _SMALL_BYTES:
            return False
        for piece in source.partitions(_SMALL_BYTES):
            passed += len(piece.content) if isinstance(piece.content, pa.Buffer) else piece.num_bytes
            if passed > _SMALL_BYTES:
                return False
    return True


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


def _estimated(job: JobConfig, sources: list[Source]) -> Counts:
    samples = [sample_of(source) for source in sources]
    tokenizer, notes = _tokenizer(job, [stratum.table for stratum in samples[0].strata])
    encoding = Encoding.of_tokenizer(tokenizer, job.data)
    engine = Reference(encoding.tokenizer_json)
    counts = []
    for sample in samples:
        num_tokens: list[int] = []
        lengths: list[int] = []
        for stratum in sample.strata:
            documents = documents_of(stratum.table, sample.source.data)
            tokens = completed(engine.encode(documents.texts, parallel=True), encoding)
            num_tokens.append(len(tokens.ids))
            lengths.extend(np.diff(tokens.offsets).tolist())
        if not lengths:
            raise no_text(job, sample.num_records, sample.source.where)
        total = total_of(sample, num_tokens)
        # Of a tokenizer that is trained on a sample.
        systematic = 0.0 if job.tokenizer.train is None else _OF_OTHER_TOKENIZER * total.tokens
        counts.append(
            _Tokens(
                total.tokens,
                math.hypot(total.error, systematic),
                total.records,
                (statistics.fmean(lengths), statistics.pstdev(lengths)),
            )
        )
        if sample.is_beginning:
            notes.append(
                f"the sample of {sample.source.where} is from its beginning, as all of it would have to be read"
            )
    if job.data.deduplicate:
        notes.append("documents that data.deduplicate takes out are counted")
    train, evaluated = (counts[0], counts[1]) if job.data.has_own_eval else _split(counts[0], job.data)
    return Counts(
        train=train.blocks(job),
        eval=evaluated.blocks(job),
        is_exact=False,
        is_prepared=False,
        how=f"estimated from {sum(sample.num_records for sample in samples):,} of its records",
        vocabulary=num_ids(tokenizer),
        notes=tuple(notes),
    )


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

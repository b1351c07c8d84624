"""The order of preparation: read, flatten, join, tokenise; then split, concatenate, cut into blocks.

Tokenising comes before the split, since a document's tokens do not depend on its side:

    source --> partitions --> tasks --> parts: the documents' ids, in the order of the source    (work/)
    parts  --> split --> gather the documents in the split's order --> blocks --> shards         (train/, eval/)

The partitions depend on the source alone. A part is written when its task is done, so a preparation that was killed
goes on with the partitions that were in flight, and the shards come out the same however it is run.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import Timeout

from clm_dist.config.data import DataConfig
from clm_dist.config.job import JobConfig
from clm_dist.config.load import fingerprint
from clm_dist.errors import ConfigError, DataError
from clm_dist.files.atomic import make_dir, read_json, remove_parts, whole_file, write_json, writing
from clm_dist.files.blocks import EVAL_BYTES, FORMAT_VERSION, Ids, Manifest, Split, file_sha256, write_shards
from clm_dist.files.stores import copy_store_here, fetch_store, store_lock, upload_store
from clm_dist.prepare.documents import documents_of, held_out
from clm_dist.prepare.files import PROBE_BYTES, Partition, read_partition
from clm_dist.prepare.gather import (
    Corpus,
    SplitDocuments,
    document_lengths,
    no_records,
    size_stream,
    split_documents,
    split_records,
    token_stream,
)
from clm_dist.prepare.group import blocks_of
from clm_dist.prepare.parts import PART_NAME, Part, Recipe, encode_partition, release_parts, write_part
from clm_dist.prepare.sources import Source, open_source, pinned, source_identity
from clm_dist.prepare.tasks import ahead, in_order, open_pool
from clm_dist.prepare.tokens import (
    Encoding,
    EngineError,
    Reference,
    choose_engine,
    load_tokenizer,
    locate_tokenizer,
    sample_of,
    tokenizer_fingerprint,
    train_tokenizer,
)
from clm_dist.progress import Progress

logger = logging.getLogger(__name__)

PARTITION_BYTES = 16 * 2**20
_SAMPLE_BYTES = 1 << 16
# With fewer partitions than that the work is done before Ray's workers have started.
_FEW_PARTITIONS = 3


@dataclass(frozen=True)
class Effort:
    """How a preparation is run; the shards do not depend on it."""

    num_tasks: int | None = None
    """Tasks at once; None takes as many as there are CPUs."""
    partition_bytes: int = PARTITION_BYTES
    """Size of a partition in the source. Each task holds a few times as much."""


def prepare(
    job: JobConfig, stores: Path, progress: Progress, effort: Effort | None = None, url: str | None = None
) -> Path:
    """The store with the job's blocks; made now, or found where the same job was prepared before.

    Files that are not as the manifest says are made again.

    Args:
        url: where stores are kept for other machines: a store that is there is fetched, one that is not is put there.

    Raises:
        ConfigError, DataError: the data or the tokenizer is not reachable, broken, or too small.
    """
    job = job.model_copy(update={"data": pinned(job.data)})
    tokenizer = _locate_tokenizer(job)
    make_dir(stores)
    identity = _identity(job, tokenizer, stores)
    store = stores / fingerprint(identity)
    with writing(store), _only_preparation(store, progress):
        is_there = (store / "manifest.json").exists()
        if url and not is_there:
            is_there = copy_store_here(f"{url}/{store.name}", store)
        damaged = _damaged_files(store, stores) if is_there else []
        for file in damaged:
            progress.note(f"{file} is not as its manifest says; preparing it again")
        if damaged or not is_there:
            try:
                _build(job, tokenizer, identity, store, progress, effort or Effort())
            except DataError:
                # Input that is wrong stays wrong. What a kill or a full disk leaves stays, to go on with.
                if not is_there:
                    shutil.rmtree(store, ignore_errors=True)
                raise
            finally:
                release_parts()
            _remember_files(store, stores)
        # By a process that was killed when all was done.
        shutil.rmtree(store / "work", ignore_errors=True)
        os.utime(store)
        if url:
            upload_store(store, f"{url}/{store.name}")
    manifest = Manifest.read(store / "manifest.json")
    counts = ", ".join(f"{name} {split.num_blocks:,}" for name, split in manifest.splits.items())
    progress.note(f"Blocks of {manifest.block_size}: {counts} ({_left_out(manifest)}; {store})")
    return store


def find_store(job: JobConfig, stores: Path, url: str | None = None) -> Path | None:
    """The store that `prepare` made for the job, here or at the URL; None where it has not."""
    job = job.model_copy(update={"data": pinned(job.data)})
    store = make_dir(stores) / fingerprint(_identity(job, _locate_tokenizer(job), stores))
    if url:
        fetch_store(f"{url}/{store.name}", store)
    return store if (store / "manifest.json").exists() else None


def _only_preparation(store: Path, progress: Progress) -> Any:
    lock = store_lock(store)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        progress.note("Waiting for another process that prepares the same blocks")
        return lock.acquire()


def _left_out(manifest: Manifest) -> str:
    """What of the records is not in the blocks."""
    splits = manifest.splits.values()
    said = []
    for reason in ("empty", "low_score", "duplicate"):
        skipped = sum(split.num_skipped[reason] for split in splits)
        if skipped:
            said.append(f"{skipped:,} {reason.replace('_', '-')} records skipped")
    if duplicates := sum(split.num_duplicates for split in splits):
        said.append(f"{duplicates:,} train documents are eval documents as well")
    said.append(f"{sum(split.num_dropped_tokens for split in splits):,} tokens dropped")
    return ", ".join(said)


def _damaged_files(store: Path, stores: Path) -> list[Path]:
    """Files whose sha256 is not the manifest's. Those that are as they were when they were written are not read."""
    known = _known_files(stores)
    damaged = []
    for file, sha256 in _files_of(store).items():
        try:
            if known.get(_state_of(file)) != sha256 and file_sha256(file) != sha256:
                damaged.append(file)
        except FileNotFoundError:
            damaged.append(file)
    if not damaged:
        _remember_files(store, stores)
    return damaged


def _remember_files(store: Path, stores: Path) -> None:
    """Remember files that are as the manifest says by their size and time."""
    known = _known_files(stores)
    seen = {_state_of(file): sha256 for file, sha256 in _files_of(store).items()}
    if not known.keys() >= seen.keys():
        write_json(stores / "files.json", known | seen)


def _known_files(stores: Path) -> dict[str, str]:
    try:
        return dict(read_json(stores / "files.json"))
    except (ConfigError, OSError, ValueError, TypeError):
        # Only a memory: without it the files are read again.
        return {}


def _files_of(store: Path) -> dict[Path, str]:
    files = Manifest.read(store / "manifest.json").sha256_of_files()
    return {store / name: sha256 for name, sha256 in files.items()}


def _state_of(file: Path) -> str:
    stat = file.stat()
    return f"{file}:{stat.st_size}:{stat.st_mtime_ns}"


def _locate_tokenizer(job: JobConfig) -> Path | None:
    if job.tokenizer_path is None:
        return None
    return locate_tokenizer(job.tokenizer_path, "tokenizer.path" if job.tokenizer.path else "model.path")


def _identity(job: JobConfig, tokenizer: Path | None, stores: Path) -> dict[str, Any]:
    """Everything that decides which blocks come out."""
    fields = {"text", "join", "eval_fraction", "split_method", "seed", "block_size", "grouping", "append_eos"}
    fields |= {"score", "min_score", "deduplicate"}
    if job.data.split_method == "hash":
        fields.add("id")
    trained = job.tokenizer.train and job.tokenizer.train.model_dump(mode="json")
    return {
        "format": FORMAT_VERSION,
        "source": source_identity(job.data, stores / "digests.json"),
        "data": job.data.model_dump(mode="json", include=fields),
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer else {"train": trained},
    }


def _build(
    job: JobConfig, tokenizer: Path | None, identity: dict[str, Any], store: Path, progress: Progress, effort: Effort
) -> None:
    progress.start("Reading records")
    source = open_source(job.data)
    if source.slice.is_relative or source.slice.start:
        source = source.narrowed(_count_records(job, source, effort), effort.partition_bytes)
    sample = _sample(job, source)
    work = make_dir(store / "work")
    remove_parts(store)
    if tokenizer is None:
        tokenizer = work / "tokenizer"
        if not tokenizer.exists():
            progress.start("Training the tokenizer")
            _train_tokenizer(job, source, tokenizer)
    loaded = load_tokenizer(tokenizer)
    encoding = Encoding.of_tokenizer(loaded, job.data)
    engine = choose_engine(job.tokenizer.engine, encoding, sample)
    try:
        parts = _encode(job, source, encoding, engine, work, progress, effort)
    except EngineError as error:
        logger.warning("gigatoken is not used, as %s; encoding again with tokenizers", error)
        for part in work.glob(f"*{PART_NAME}"):
            part.unlink()
        parts = _encode(job, source, encoding, Reference.name, work, progress, effort)

    progress.start("Writing blocks")
    corpus = Corpus.of_parts(parts)
    records = split_records(corpus.held_out, source.slice, job.data)
    splits = {}
    for name in records:
        documents = split_documents(corpus, records[name], job.data, records["eval"] if name == "train" else None)
        splits[name] = _write_split(job, store, name, len(records[name]), corpus, documents, encoding)
    with writing(store):
        loaded.save_pretrained(store / "tokenizer")
        others = [store / EVAL_BYTES, *sorted((store / "tokenizer").iterdir())]
        Manifest(
            fingerprint=store.name,
            origin=source.where,
            source=identity,
            block_size=job.data.block_size,
            dtype=str(encoding.dtype),
            engine=" and ".join(sorted({part.stats.engine for part in parts})),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            splits=splits,
            files={str(file.relative_to(store)): file_sha256(file) for file in others},
        ).write(store / "manifest.json")


def _count_records(job: JobConfig, source: Source, effort: Effort) -> list[int]:
    """How many records the partitions have, up to the first that the slice takes where that is known before."""
    counts: list[int] = []
    with open_pool(effort.num_tasks, is_small=True) as pool:
        partitions = source.partitions(effort.partition_bytes)
        for _, count in in_order(pool, partitions, lambda each: pool.submit(_num_records, each, job.data)):
            counts.append(count)
            if not source.slice.is_relative and sum(counts) > source.slice.start:
                break
    return counts


def _num_records(partition: Partition, data: DataConfig) -> int:
    return len(read_partition(partition, data))


def _no_text(job: JobConfig, num_records: int, where: str) -> DataError:
    return DataError(
        f"data.text {job.data.text} is empty in all {num_records:,} records of {where}; name the field that holds "
        "the text",
        field="data.text",
    )


def _sample(job: JobConfig, source: Source) -> Any:
    """Texts from the beginning of the source."""
    num_records = 0
    for partition in source.partitions(PROBE_BYTES):
        table = read_partition(partition, job.data)
        num_records += len(table)
        texts = documents_of(table, job.data).texts
        if len(texts):
            return sample_of(texts, _SAMPLE_BYTES)
    if not num_records and (source.slice.start or source.slice.stop is not None):
        raise no_records(source.slice)
    if not num_records:
        raise DataError(f"{source.where} has no records: its files are empty; name files with text", field="data.path")
    raise _no_text(job, num_records, source.where)


def _encode(
    job: JobConfig,
    source: Source,
    encoding: Encoding,
    engine: str,
    work: Path,
    progress: Progress,
    effort: Effort,
) -> list[Part]:
    """The parts of all partitions that the job's rows lie in; those that are there already are not made again."""
    partitions = enumerate(source.partitions(effort.partition_bytes))
    first = list(islice(partitions, _FEW_PARTITIONS))
    display = _Display(progress, source.num_bytes)
    parts: list[Part] = []
    num_records = 0
    stop = source.slice.stop
    with open_pool(effort.num_tasks, is_small=len(first) < _FEW_PARTITIONS) as pool:
        recipe = pool.share(Recipe(job.data, encoding, engine, parallel=pool.num_tasks == 1))

        def path_of(index: int) -> Path:
            return work / f"{effort.partition_bytes}-{index:06d}{PART_NAME}"

        def begin(item: tuple[int, Partition]) -> Any:
            index, partition = item
            if (done := Part.open(path_of(index), encoding.dtype)) is not None:
                return lambda: done
            # At least the records of the parts before are not this partition's.
            most = None if stop is None else stop - num_records
            return pool.submit(encode_partition, partition, recipe, most)

        for (index, partition), result in in_order(pool, chain(first, partitions), begin):
            if not isinstance(result, Part):
                result = write_part(path_of(index), result, encoding.dtype)
                display.log(index, partition, result)
            parts.append(result)
            num_records += result.stats.num_records
            display.update(index, partition)
            if stop is not None and num_records >= stop:
                break
    return parts


class _Display:
    """What a person sees of the partitions as they are done."""

    def __init__(self, progress: Progress, num_bytes: int | None) -> None:
        self._progress = progress
        self._total = None if num_bytes is None else max(1, num_bytes >> 20)
        self._began = time.monotonic()
        self._source_bytes = self._text_bytes = self._tokens = 0
        progress.start("Tokenising", total=self._total, unit="MiB")

    def log(self, index: int, partition: Partition, part: Part) -> None:
        """Count a part that was made now."""
        stats = part.stats
        self._text_bytes += stats.num_text_bytes
        self._tokens += stats.num_tokens
        self._progress.log(
            f"partition {index}: {stats.num_records:,} records, {stats.num_text_bytes / 1e6:,.2f} MB of text, "
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


def _write_split(
    job: JobConfig,
    store: Path,
    name: str,
    num_records: int,
    corpus: Corpus,
    split: SplitDocuments,
    encoding: Encoding,
) -> Split:
    block_size = job.data.block_size
    documents = split.documents
    num_tokens = int(corpus.num_tokens[documents].sum(dtype=np.int64))
    if not len(documents) and split.num_skipped["duplicate"]:
        raise DataError(
            f"data.deduplicate leaves nothing of the {name} split: the eval split has each of its documents as well; "
            "set data.deduplicate to false, or take more records",
            field="data.deduplicate",
        )
    if not len(documents):
        raise _no_text(job, num_records, f"the {name} split")
    if num_tokens < block_size:
        raise DataError(
            f"the {name} split has {num_tokens} tokens ({num_records} records), less than one block of "
            f"{block_size}; take more records, lower data.block_size or change data.eval_fraction",
            field="data.block_size",
        )
    num_ends = 0
    block_bytes: list[npt.NDArray[np.int64]] = []

    def blocks() -> Iterator[Ids]:
        nonlocal num_ends
        cut = partial(blocks_of, block_size=block_size, grouping=job.data.grouping)
        # While one chunk is written, the next is gathered.
        ids_of_chunks = ahead(cut(token_stream(corpus, split, encoding.dtype)))
        if name == "train":
            for ids in ids_of_chunks:
                num_ends += int(np.count_nonzero(_followed_ends(ids, encoding)))
                yield ids
            return
        for ids, sizes in zip(ids_of_chunks, ahead(cut(size_stream(corpus, split, encoding))), strict=True):
            ends = _followed_ends(ids, encoding)
            num_ends += int(np.count_nonzero(ends))
            predicted = sizes[:, 1:].astype(np.int64)
            block_bytes.append(np.stack([predicted.sum(1), (predicted * ~ends).sum(1)], axis=1))
            yield ids

    shards = write_shards(store, name, blocks(), block_size, encoding.dtype)
    num_blocks = sum(shard.num_blocks for shard in shards)
    if num_blocks == 0:
        raise DataError(
            f"the {name} split has no 1,000 records with {block_size} tokens, and data.grouping guide drops the "
            "remainder of each; use data.grouping carry",
            field="data.grouping",
        )
    if name == "eval":
        with whole_file(store / EVAL_BYTES) as part, part.open("wb") as file:
            np.save(file, np.concatenate(block_bytes))
    return Split(
        num_records=num_records,
        num_skipped=split.num_skipped,
        num_documents=len(documents),
        num_duplicates=split.num_duplicates,
        num_text_bytes=int(corpus.num_bytes[documents].sum(dtype=np.int64)),
        num_tokens=num_tokens,
        num_blocks=num_blocks,
        num_dropped_tokens=num_tokens - num_blocks * block_size,
        num_document_ends=num_ends,
        document_lengths=document_lengths(corpus, documents),
        shards=tuple(shards),
    )


def _followed_ends(ids: Ids, encoding: Encoding) -> npt.NDArray[np.bool_]:
    """Where a block's next token begins another document: (num_blocks, block_size) -> (num_blocks, block_size - 1)."""
    found: npt.NDArray[np.bool_] = ids[:, :-1] == (-1 if encoding.eos is None else encoding.eos)
    return found


def _train_records(job: JobConfig, source: Source) -> npt.NDArray[np.bool_]:
    """Which records of the source, up to the last that the job takes, are in the train split."""
    sides = [np.empty(0, bool)]
    for partition in source.partitions(PARTITION_BYTES):
        table = read_partition(partition, job.data)
        of_hash_split = job.data.split_method == "hash"
        sides.append(held_out(table, job.data) if of_hash_split else np.zeros(len(table), bool))
        if source.slice.stop is not None and sum(map(len, sides)) >= source.slice.stop:
            break
    of_eval = np.concatenate(sides)
    train = np.zeros(len(of_eval), bool)
    train[split_records(of_eval, source.slice, job.data)["train"]] = True
    return train


def _train_tokenizer(job: JobConfig, source: Source, directory: Path) -> None:
    """Train a tokenizer on the documents of the train split, in the order of the source."""
    assert job.tokenizer.train is not None
    records = _train_records(job, source)

    def texts() -> Iterator[str]:
        first = 0
        for partition in source.partitions(PARTITION_BYTES):
            table = read_partition(partition, job.data)
            documents = documents_of(table, job.data)
            here = records[first : first + len(table)][documents.records]
            yield from documents.texts.filter(pa.array(here)).to_pylist()
            first += len(table)
            if first >= len(records):
                return

    if not any(text for text in islice(texts(), 1)):
        raise _no_text(job, int(np.count_nonzero(records)), "the train split")
    unfinished = directory.with_suffix(".part")
    with writing(directory):
        train_tokenizer(texts(), job.tokenizer.train, unfinished)
        unfinished.rename(directory)

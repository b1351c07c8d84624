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
from pathlib import Path
from typing import Any

from filelock import Timeout

from clm_dist.config.job import JobConfig
from clm_dist.config.load import fingerprint
from clm_dist.errors import ConfigError, DataError
from clm_dist.files.atomic import make_dir, read_json, remove_parts, write_json, writing
from clm_dist.files.blocks import EVAL_BYTES, FORMAT_VERSION, Manifest, file_sha256
from clm_dist.files.stores import copy_store_here, fetch_store, store_lock, upload_store
from clm_dist.prepare.corpus import Corpus
from clm_dist.prepare.documents import documents_of, no_text
from clm_dist.prepare.encode import Effort, count_records, encode_all
from clm_dist.prepare.encoded import PART_NAME, release_parts
from clm_dist.prepare.encoding import Encoding
from clm_dist.prepare.engines import EngineError, Reference, choose_engine, sample_of
from clm_dist.prepare.identity import pinned, source_identity
from clm_dist.prepare.partitions import PROBE_BYTES, read_partition
from clm_dist.prepare.sources import Source, open_source
from clm_dist.prepare.splits import no_records, split_documents, split_records
from clm_dist.prepare.tokenizer import load_tokenizer, locate_tokenizer, tokenizer_fingerprint
from clm_dist.prepare.tokenizer_training import train_own_tokenizer
from clm_dist.prepare.write_split import write_split
from clm_dist.progress import Progress

logger = logging.getLogger(__name__)


_SAMPLE_BYTES = 1 << 16


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
        source = source.narrowed(count_records(job, source, effort), effort.partition_bytes)
    sample = _sample(job, source)
    work = make_dir(store / "work")
    remove_parts(store)
    if tokenizer is None:
        tokenizer = work / "tokenizer"
        if not tokenizer.exists():
            progress.start("Training the tokenizer")
            train_own_tokenizer(job, source, tokenizer)
    loaded = load_tokenizer(tokenizer)
    encoding = Encoding.of_tokenizer(loaded, job.data)
    engine = choose_engine(job.tokenizer.engine, encoding, sample)
    try:
        parts = encode_all(job, source, encoding, engine, work, progress, effort)
    except EngineError as error:
        logger.warning("gigatoken is not used, as %s; encoding again with tokenizers", error)
        for part in work.glob(f"*{PART_NAME}"):
            part.unlink()
        parts = encode_all(job, source, encoding, Reference.name, work, progress, effort)

    progress.start("Writing blocks")
    corpus = Corpus.of_parts(parts)
    records = split_records(corpus.held_out, source.slice, job.data)
    splits = {}
    for name in records:
        documents = split_documents(corpus, records[name], job.data, records["eval"] if name == "train" else None)
        splits[name] = write_split(job, store, name, len(records[name]), corpus, documents, encoding)
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
    raise no_text(job, num_records, source.where)

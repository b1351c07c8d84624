"""The order of preparation: read, flatten, join, tokenise; then split, concatenate, cut into blocks.

Tokenising comes before the split, since a document's tokens do not depend on its side:

    source --> partitions --> tasks --> encoded: the documents' ids, in the order of the source       (work/)
    encoded --> split --> gather the documents in the split's order --> blocks --> shards             (train/, eval/)

The partitions depend on the source alone. An encoded partition is written when its task is done, so a preparation that
was killed goes on with the partitions that were in flight, and the shards come out the same however it is run.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from clm_dist.config.job import JobConfig
from clm_dist.config.load import fingerprint
from clm_dist.errors import DataError
from clm_dist.files.atomic import make_dir, remove_unfinished, writing
from clm_dist.files.blocks import EVAL_BYTES, FORMAT_VERSION, Blocks, Manifest
from clm_dist.files.hashes import HashMemory, file_sha256
from clm_dist.files.lease import Holder
from clm_dist.files.stores import PARTIAL_SUFFIX, Store, Stores
from clm_dist.prepare.corpus import Corpus, Rows
from clm_dist.prepare.documents import documents_of, no_text
from clm_dist.prepare.encode import Effort, count_records, encode_partitions
from clm_dist.prepare.encoded import Encoded, release_encoded
from clm_dist.prepare.encoding import Encoding
from clm_dist.prepare.engines import EngineError, Reference, choose_engine, sample_of
from clm_dist.prepare.fertility import measure_fertility, sample_of_blocks
from clm_dist.prepare.identity import pinned, source_identity
from clm_dist.prepare.own_eval import eval_data, naming
from clm_dist.prepare.partitions import PROBE_BYTES, read_partition
from clm_dist.prepare.sources import Source, open_sources
from clm_dist.prepare.splits import no_records, records_of, split_documents, split_records
from clm_dist.prepare.tokenizer_training import train_own_tokenizer
from clm_dist.prepare.write_split import write_split
from clm_dist.pretrained.tokenizer import load_tokenizer, locate_tokenizer, tokenizer_fingerprint
from clm_dist.progress import Progress

logger = logging.getLogger(__name__)


_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Resolved:
    """A job with all that its blocks are made from: found once, and handed on."""

    job: JobConfig
    """With the commit that its Hub data set has now."""
    tokenizer: Path | None
    """Directory of its tokenizer; None where one is trained."""
    identity: dict[str, Any]
    """All that decides which blocks come out."""
    stores: Stores

    @property
    def store(self) -> Store:
        """Where its blocks are, or will be."""
        return self.stores.store(fingerprint(self.identity))


def resolve(job: JobConfig, stores: Stores) -> Resolved:
    """Find what a job's blocks are made from.

    Raises:
        ConfigError, DataError: the data or the tokenizer is not reachable or broken.
        StorageError, HubError: a storage or the Hub is away.
    """
    make_dir(stores.local)
    job = job.model_copy(update={"data": pinned(job.data)})
    tokenizer = None
    if job.tokenizer_path is not None:
        field, revision = ("tokenizer.path", None) if job.tokenizer.path else ("model.path", job.model.revision)
        tokenizer = locate_tokenizer(job.tokenizer_path, field, revision)
    return Resolved(job, tokenizer, _identity(job, tokenizer, stores.known_sources()), stores)


def prepare(job: JobConfig, stores: Stores, progress: Progress, effort: Effort | None = None) -> Store:
    """`prepare_resolved`, for a job that is not resolved yet."""
    return prepare_resolved(resolve(job, stores), progress, effort)


def prepare_resolved(resolved: Resolved, progress: Progress, effort: Effort | None = None) -> Store:
    """The store with a job's blocks; made now, or found where the same blocks were prepared before.

    Files that are not as the manifest says are made again. A store that is at the URL is fetched, one that is not is
    put there.

    Raises:
        ConfigError, DataError: the data is broken, or too small.
        StorageError: a disk is full, or a storage is away; what is done until then is kept.
    """
    progress.start("Looking for the blocks", kind="prepare")
    store, known = resolved.store, resolved.stores.known_files()

    def note_wait(holder: Holder) -> None:
        progress.note(f"Waiting for another process that prepares the same blocks: {holder}")

    with writing(store.local), store.lease().hold(timeout_s=None, on_wait=note_wait):
        is_there = store.fetch_held()
        damaged = store.problems(known) if is_there else {}
        for name in damaged:
            progress.note(f"{store.local / name} is not as its manifest says; preparing it again")
        if damaged or not is_there:
            try:
                _build(resolved, progress, effort or Effort())
            except DataError:
                # Input that is wrong stays wrong. What a kill or a full disk leaves stays, to go on with.
                if not is_there:
                    shutil.rmtree(store.local, ignore_errors=True)
                raise
            finally:
                release_encoded()
            store.remember(known)
        # By a process that was killed when all was done.
        shutil.rmtree(store.local / "work", ignore_errors=True)
        os.utime(store.local)
        store.upload()
    manifest = store.manifest()
    counts = ", ".join(f"{name} {split.num_blocks:,}" for name, split in manifest.splits.items())
    progress.note(f"Blocks of {manifest.block_size}: {counts} ({_left_out(manifest)}; {store.local})")
    return store


def _left_out(manifest: Manifest) -> str:
    """The records and tokens that are not in the blocks, in words."""
    splits = manifest.splits.values()
    said = []
    for reason in ("empty", "low_score", "duplicate", "repeated"):
        skipped = sum(split.num_skipped.get(reason, 0) for split in splits)
        if skipped:
            said.append(f"{skipped:,} {reason.replace('_', '-')} records skipped")
    if duplicates := sum(split.num_duplicates for split in splits):
        said.append(f"{duplicates:,} train documents are eval documents as well")
    if repeated := sum(split.num_repeated or 0 for split in splits):
        said.append(f"{repeated:,} train documents repeat an earlier one")
    said.append(f"{sum(split.num_dropped_tokens for split in splits):,} tokens dropped")
    return ", ".join(said)


def _identity(job: JobConfig, tokenizer: Path | None, known: HashMemory) -> dict[str, Any]:
    """All that decides which blocks come out.

    Args:
        known: the memory of the source's files.
    """
    fields = {"text", "join", "eval_fraction", "split_method", "seed", "block_size", "grouping", "append_eos"}
    fields |= {"score", "min_score", "deduplicate"}
    if job.data.has_own_eval:
        fields -= {"eval_fraction", "split_method", "seed"}
    if job.data.splits_by_hash:
        fields.add("id")
    data = job.data.model_dump(mode="json", include=fields)
    if job.data.join is not None and job.data.fills_items:
        data["items"] = True
    if job.data.deduplicate:
        # Stores in which only documents of the eval split are removed have `true` here.
        data["deduplicate"] = ["eval", "train"]
    trained = job.tokenizer.train and job.tokenizer.train.model_dump(mode="json")
    own_eval = {}
    if (of_eval := eval_data(job.data)) is not None:
        with naming(job.data, of_eval=True):
            own_eval = {"eval": source_identity(of_eval, known)}
    return {
        "format": FORMAT_VERSION,
        "source": source_identity(job.data, known),
        "data": data,
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer else {"train": trained},
        **own_eval,
    }


def _build(resolved: Resolved, progress: Progress, effort: Effort) -> None:
    job, tokenizer, store = resolved.job, resolved.tokenizer, resolved.store.local
    progress.start("Reading records")
    sources, samples = [], []
    for source in list(open_sources(job.data)):
        for what in source.left_out:
            progress.note(f"Not read, in {what}")
        with naming(job.data, of_eval=source.is_eval):
            if source.slice.is_relative or source.slice.start:
                source = source.narrowed(count_records(source, effort), effort.partition_bytes)
            samples.append(_sample(job, source))
        sources.append(source)
    work = make_dir(store / "work")
    remove_unfinished(store)
    if tokenizer is None:
        tokenizer = work / "tokenizer"
        if not tokenizer.exists():
            progress.start("Training the tokenizer")
            train_own_tokenizer(job, sources[0], tokenizer)
    loaded = load_tokenizer(tokenizer)
    encoding = Encoding.of_tokenizer(loaded, job.data)
    engine = choose_engine(job.tokenizer.engine, encoding, samples[0])

    def encode(engine: str) -> list[list[Encoded]]:
        """The partitions of each source."""
        encoded = []
        for source in sources:
            with naming(job.data, of_eval=source.is_eval):
                encoded.append(encode_partitions(source, encoding, engine, work, progress, effort))
        return encoded

    try:
        encoded = encode(engine)
    except EngineError as error:
        logger.warning("gigatoken is not used, as %s; encoding again with tokenizers", error)
        for file in work.glob(f"*{PARTIAL_SUFFIX}"):
            file.unlink()
        encoded = encode(Reference.name)

    _check_unchanged(resolved)
    progress.start("Writing blocks")
    partitions = list(chain(*encoded))
    corpus = Corpus.of_encoded(partitions)
    if job.data.has_own_eval:
        records = _records_of_each(sources, encoded)
    else:
        records = split_records(corpus.held_out, sources[0].slice, job.data)
    splits = {}
    for name in records:
        documents = split_documents(corpus, records[name], job.data, records["eval"] if name == "train" else None)
        splits[name] = write_split(job, store, name, len(records[name]), corpus, documents, encoding)
    with writing(store):
        loaded.save_pretrained(store / "tokenizer")
        others = [store / EVAL_BYTES, *sorted((store / "tokenizer").iterdir())]
        manifest = Manifest(
            fingerprint=store.name,
            origin="; eval: ".join(source.where for source in sources),
            source=resolved.identity,
            block_size=job.data.block_size,
            dtype=str(encoding.dtype),
            engine=" and ".join(sorted({one.stats.engine for one in partitions})),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            splits=splits,
            files={str(file.relative_to(store)): file_sha256(file) for file in others},
        )
        sample = sample_of_blocks(Blocks(store, "train", manifest=manifest))
        resolved.store.write_manifest(
            replace(manifest, tokens_per_word=measure_fertility(loaded, sample).tokens_per_word)
        )


def _check_unchanged(resolved: Resolved) -> None:
    """Raise DataError where a plugin's records are others by now than those that the store is named after."""
    data, known = resolved.job.data, resolved.stores.known_sources()
    if data.source != "plugin":
        return
    of_eval = eval_data(data)
    now = [source_identity(one, known) for one in (data, of_eval) if one is not None]
    if now != [resolved.identity[name] for name in ("source", "eval") if name in resolved.identity]:
        raise DataError(
            f"the records of data.plugin {data.plugin} changed while they were read: its identity is another; "
            "run again",
            field="data.plugin",
        )


def _records_of_each(sources: Sequence[Source], encoded: Sequence[Sequence[Encoded]]) -> dict[str, Rows]:
    """The records of the train and the eval split, where each has a source of its own."""
    records = {}
    before = 0
    for name, source, of_source in zip(("train", "eval"), sources, encoded, strict=True):
        num_records = sum(one.stats.num_records for one in of_source)
        with naming(source.data, of_eval=source.is_eval):
            records[name] = before + records_of(source.slice, num_records)
        before += num_records
    return records


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

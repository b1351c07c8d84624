"""The order of preparation: load, subset, split, flatten, join, tokenise, concatenate, cut into blocks.

The records of a split are cut into partitions of 1,000. A partition's tokens are written when it is done, so a
preparation that was killed goes on with the partition in flight, and the shards come out the same.
"""

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import FileLock

from clm_dist.config import DataConfig, JobConfig
from clm_dist.errors import DataError
from clm_dist.job import fingerprint
from clm_dist.prepare.documents import Rows, documents_of, split_rows
from clm_dist.prepare.group import blocks_of
from clm_dist.prepare.sources import load_records, pinned, source_identity
from clm_dist.prepare.tokens import Encoder, locate_tokenizer, tokenizer_fingerprint, train_tokenizer
from clm_dist.progress import Progress
from clm_dist.run_dir import make_dir, writing
from clm_dist.shards import Ids, Manifest, Split, TokenBytes, write_shards

logger = logging.getLogger(__name__)

PARTITION_RECORDS = 1000
"""Also the batch of `datasets.map`, whose remainders the guide drops."""
_LOSSY_SHARE = 0.01


def prepare(job: JobConfig, stores: Path, progress: Progress) -> Path:
    """The store with the job's blocks; made now, or found where the same job was prepared before.

    Raises:
        ConfigError, DataError: the data or the tokenizer is not reachable, broken, or too small.
    """
    job = job.model_copy(update={"data": pinned(job.data)})
    tokenizer = _locate_tokenizer(job)
    make_dir(stores)
    identity = _identity(job, tokenizer, stores)
    store = stores / fingerprint(identity)
    with writing(store), FileLock(stores / f".{store.name}.lock"):
        if not (store / "manifest.json").exists():
            progress.start("Loading records")
            table = load_records(job.data)
            rows = split_rows(table, job.data)
            _check_texts(table, rows, job.data)
            encoder = Encoder(tokenizer, job.data) if tokenizer else None
            try:
                _build(job, table, rows, encoder, identity, store, progress)
            except DataError:
                # Input that is wrong stays wrong. What a kill or a full disk leaves stays, to go on with.
                shutil.rmtree(store, ignore_errors=True)
                raise
    manifest = Manifest.read(store / "manifest.json")
    counts = ", ".join(f"{name} {split.num_blocks:,}" for name, split in manifest.splits.items())
    progress.note(f"Blocks of {manifest.block_size}: {counts} ({_left_out(manifest)}; {store})")
    return store


def _left_out(manifest: Manifest) -> str:
    """What of the records is not in the blocks."""
    splits = manifest.splits.values()
    skipped = sum(split.num_skipped["empty"] for split in splits)
    dropped = f"{sum(split.num_dropped_tokens for split in splits):,} tokens dropped"
    return f"{skipped:,} empty records skipped, {dropped}" if skipped else dropped


def find_store(job: JobConfig, stores: Path) -> Path | None:
    """The store that `prepare` made for the job; None where it has not."""
    job = job.model_copy(update={"data": pinned(job.data)})
    store = make_dir(stores) / fingerprint(_identity(job, _locate_tokenizer(job), stores))
    return store if (store / "manifest.json").exists() else None


def _locate_tokenizer(job: JobConfig) -> Path | None:
    if job.tokenizer_path is None:
        return None
    return locate_tokenizer(job.tokenizer_path, "tokenizer.path" if job.tokenizer.path else "model.path")


def _identity(job: JobConfig, tokenizer: Path | None, stores: Path) -> dict[str, Any]:
    """Everything that decides which blocks come out."""
    fields = {"text", "join", "eval_fraction", "split_method", "seed", "block_size", "grouping"}
    if job.data.split_method == "hash":
        fields.add("id")
    data = job.data.model_dump(mode="json", include=fields)
    trained = job.tokenizer.train and job.tokenizer.train.model_dump(mode="json")
    return {
        "source": source_identity(job.data, stores / "digests.json"),
        "data": data | {"append_eos": job.data.append_eos},
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer else {"train": trained},
    }


def _check_texts(table: pa.Table, rows: Mapping[str, Rows], data: DataConfig) -> None:
    """Raises DataError where a split has no text at all; the first text ends the search."""
    for name, indices in rows.items():
        parts = (indices[start : start + PARTITION_RECORDS] for start in range(0, len(indices), PARTITION_RECORDS))
        if not any(any(documents_of(table.take(part), data)) for part in parts):
            raise DataError(
                f"data.text {data.text} is empty in all {len(indices)} records of the {name} split; "
                "name the field that holds the text",
                field="data.text",
            )


def _build(
    job: JobConfig,
    table: pa.Table,
    rows: Mapping[str, Rows],
    encoder: Encoder | None,
    identity: dict[str, Any],
    store: Path,
    progress: Progress,
) -> None:
    work = make_dir(store / "work")
    if encoder is None:
        trained = work / "tokenizer"
        if not trained.exists():
            progress.start("Training the tokenizer")
            _train_tokenizer(job, table.take(rows["train"]), trained)
        encoder = Encoder(trained, job.data)
    token_bytes = encoder.token_bytes()

    starts = {name: range(0, len(indices), PARTITION_RECORDS) for name, indices in rows.items()}
    progress.start("Tokenising", total=sum(map(len, starts.values())), unit="partition")
    began, num_done, splits, total = time.monotonic(), 0, {}, Counter[str]()
    block_bytes: dict[str, npt.NDArray[np.int64]] = {}
    for name, indices in rows.items():
        counts = Counter[str]()
        parts = [work / f"{name}-{start:09d}.npz" for start in starts[name]]
        for start, part in zip(starts[name], parts, strict=True):
            if not part.exists():
                some = table.take(indices[start : start + PARTITION_RECORDS])
                _tokenise(part, documents_of(some, job.data), encoder, token_bytes)
            counts.update(_read_partition(part)[1])
            num_done += 1
            rate = (total["text_bytes"] + counts["text_bytes"]) / 1e6 / (time.monotonic() - began)
            progress.update(num_done, rate=f"{rate:.1f} MB/s")
        splits[name], block_bytes[name] = _write_split(job, store, name, parts, encoder, counts, token_bytes)
        total.update(counts)

    if total["lost_bytes"] > _LOSSY_SHARE * total["text_bytes"]:
        logger.warning("the tokenizer does not keep the text's bytes, so there will be no bits per byte")
        block_bytes["eval"][:] = 0
    with writing(store):
        np.save(store / "eval" / "bytes.npy", block_bytes["eval"])
        encoder.tokenizer.save_pretrained(store / "tokenizer")
        Manifest(
            fingerprint=store.name,
            source=identity,
            block_size=job.data.block_size,
            dtype=str(encoder.dtype),
            engine=encoder.engine,
            tokenizer_fingerprint=tokenizer_fingerprint(encoder.directory),
            splits=splits,
        ).write(store / "manifest.json")
        shutil.rmtree(work)


def _tokenise(part: Path, documents: list[list[str]], encoder: Encoder, token_bytes: TokenBytes) -> None:
    """Write a partition's tokens and counts; the file is whole or not there."""
    texts = [text for record in documents for text in record]
    encoded = encoder.encode(texts)
    sizes = np.array([len(text.encode()) for text in texts], np.int64)
    token_sizes = np.array([token_bytes[ids].sum(dtype=np.int64) for ids in encoded], np.int64)
    ids = np.concatenate([np.empty(0, encoder.dtype), *encoded])
    counts = {
        "records": len(documents),
        "skipped": sum(not record for record in documents),
        "documents": len(texts),
        "text_bytes": int(sizes.sum()),
        "lost_bytes": int(np.abs(sizes - token_sizes).sum()),
        "tokens": len(ids),
    }
    unfinished = part.with_suffix(".part")
    with writing(part):
        with unfinished.open("wb") as file:
            np.savez(file, ids=ids, counts=json.dumps(counts))
        unfinished.replace(part)


def _read_partition(part: Path) -> tuple[Ids, dict[str, int]]:
    with np.load(part) as saved:
        return saved["ids"], json.loads(str(saved["counts"]))


def _write_split(
    job: JobConfig,
    store: Path,
    name: str,
    parts: list[Path],
    encoder: Encoder,
    counts: Mapping[str, int],
    token_bytes: TokenBytes,
) -> tuple[Split, npt.NDArray[np.int64]]:
    """The split, and the bytes of text of what each block predicts, without and with `data.document_mask`."""
    block_size = job.data.block_size
    if counts["tokens"] < block_size:
        raise DataError(
            f"the {name} split has {counts['tokens']} tokens ({counts['records']} records), less than one block of "
            f"{block_size}; take more records, lower data.block_size or change data.eval_fraction",
            field="data.block_size",
        )

    def token_streams() -> Iterator[Ids]:
        for part in parts:
            yield _read_partition(part)[0]

    num_document_ends = 0
    block_bytes: list[npt.NDArray[np.int64]] = [np.empty((0, 2), np.int64)]

    def counted_blocks() -> Iterator[Ids]:
        nonlocal num_document_ends
        for ids in blocks_of(token_streams(), block_size, job.data.grouping):
            follows_end = (ids[:, :-1] == encoder.eos) if encoder.eos is not None else np.zeros(ids[:, :-1].shape, bool)
            num_document_ends += int(follows_end.sum())
            sizes = token_bytes[ids[:, 1:]].astype(np.int64)
            block_bytes.append(np.stack([sizes.sum(axis=1), (sizes * ~follows_end).sum(axis=1)], axis=1))
            yield ids

    shards = write_shards(store, name, counted_blocks(), block_size, encoder.dtype)
    num_blocks = sum(shard.num_blocks for shard in shards)
    if num_blocks == 0:
        raise DataError(
            f"the {name} split has no 1,000 records with {block_size} tokens, and data.grouping guide drops the "
            "remainder of each; use data.grouping carry",
            field="data.grouping",
        )
    split = Split(
        num_records=counts["records"],
        num_skipped={"empty": counts["skipped"]},
        num_documents=counts["documents"],
        num_text_bytes=counts["text_bytes"],
        num_tokens=counts["tokens"],
        num_blocks=num_blocks,
        num_dropped_tokens=counts["tokens"] - num_blocks * block_size,
        num_document_ends=num_document_ends,
        shards=tuple(shards),
    )
    return split, np.concatenate(block_bytes)


def _train_tokenizer(job: JobConfig, table: pa.Table, directory: Path) -> None:
    assert job.tokenizer.train is not None
    unfinished = directory.with_suffix(".part")
    texts = (text for record in documents_of(table, job.data) for text in record)
    with writing(directory):
        train_tokenizer(texts, job.tokenizer.train, unfinished)
        unfinished.rename(directory)

"""An encoded partition: its documents' ids, in a file that the splits are gathered from.

The file is two Arrow IPC streams, one after the other, which are mapped with no copy, and 8 bytes of xxh3 of them:

    documents   ids: large_binary (the ids' bytes), hash: uint64, record: int64, num_bytes: int64 (of the text),
                sizes: large_binary (bytes of text of each id, uint32), null where the vocabulary's table says them
    records     skipped: uint8 (a `Skip`), held_out: bool (of the hash split)

The metadata of the first says how many texts and bytes there were, and which engine encoded them.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import xxhash

from clm_dist.config.data import DataConfig
from clm_dist.files.atomic import whole_file
from clm_dist.prepare.documents import documents_of, held_out
from clm_dist.prepare.encoding import Encoding, completed
from clm_dist.prepare.engines import build_engine, check_engine, sample_of
from clm_dist.prepare.partition import Partition
from clm_dist.prepare.partitions import read_partition
from clm_dist.prepare.token_bytes import token_sizes

# Each partition holds the fast engine against the reference on a thousandth of its text.
_CHECKED_SHARE = 1 / 1000
_STATS = b"clm_dist"
_DIGEST_BYTES = 8


@dataclass(frozen=True)
class Recipe:
    """All that a task needs, apart from its partition."""

    data: DataConfig
    encoding: Encoding
    engine: str
    parallel: bool
    """Whether one task uses all cores, as it does where it is the only one."""


@dataclass(frozen=True)
class EncodingStats:
    num_records: int
    num_text_bytes: int
    num_tokens: int
    engine: str


def encode_partition(partition: Partition, recipe: Recipe, most_records: int | None) -> pa.Buffer:
    """An encoded partition, as its file holds it but for the checksum.

    Args:
        most_records: read at most this number of records; None reads all.

    Raises:
        DataError: the partition is broken; the message names file and record.
        EngineError: the fast engine returns other ids than the reference.
    """
    table = read_partition(partition, recipe.data)
    if most_records is not None:
        table = table.slice(0, most_records)
    documents = documents_of(table, recipe.data)
    texts, encoding = documents.texts, recipe.encoding
    engine = build_engine(recipe.engine, encoding.tokenizer_json)
    if recipe.engine != "tokenizers" and len(texts):
        check_engine(engine, encoding, sample_of(texts, max(1, int(texts.nbytes * _CHECKED_SHARE))))
    tokens = completed(engine.encode(texts, parallel=recipe.parallel), encoding)
    sizes = token_sizes(tokens, texts, encoding)
    num_bytes = pa.compute.binary_length(texts)
    stats = EncodingStats(
        num_records=len(table),
        num_text_bytes=int(num_bytes.to_numpy().sum()),
        num_tokens=len(tokens.ids),
        engine=recipe.engine,
    )
    rows = pa.record_batch(
        {
            "ids": _as_binary(tokens.ids, tokens.offsets),
            "hash": pa.array(_hashes(texts)),
            "record": pa.array(documents.records),
            "num_bytes": num_bytes,
            "sizes": pa.nulls(len(texts), pa.large_binary()) if sizes is None else _as_binary(sizes, tokens.offsets),
        },
        metadata={_STATS: json.dumps(asdict(stats)).encode()},
    )
    records = pa.record_batch(
        {
            "skipped": pa.array(documents.skipped),
            "held_out": pa.array(
                held_out(table, recipe.data) if recipe.data.splits_by_hash else np.zeros(len(table), bool)
            ),
        }
    )
    sink = pa.BufferOutputStream()
    for batch in (rows, records):
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
    return sink.getvalue()


def write_encoded(path: Path, content: pa.Buffer, dtype: np.dtype[Any]) -> "Encoded":
    """Write what `encode_partition` returned to a file, whole; `dtype` is that of the ids."""
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        file.write(content)
        file.write(xxhash.xxh3_64_digest(content))
    encoded = Encoded.open(path, dtype)
    assert encoded is not None
    return encoded


@dataclass(frozen=True)
class Encoded:
    """The file of an encoded partition, and what of it is small enough to stay in memory."""

    path: Path
    stats: EncodingStats
    hashes: npt.NDArray[np.uint64]
    """(num_documents,); equal for documents that are equal to the letter."""
    num_tokens: npt.NDArray[np.int32]
    """(num_documents,)"""
    num_bytes: npt.NDArray[np.int32]
    """Bytes of text of each document, (num_documents,)."""
    num_documents: npt.NDArray[np.int32]
    """Documents of each record, (num_records,)."""
    skipped: npt.NDArray[np.uint8]
    """A `Skip` for each record, (num_records,)."""
    held_out: npt.NDArray[np.bool_]
    """Whether the hash split holds a record out, (num_records,)."""

    @classmethod
    def open(cls, path: Path, dtype: np.dtype[Any]) -> "Encoded | None":
        """None where the file is not there or not as it was written: the power may have gone meanwhile.

        Args:
            dtype: of the ids.
        """
        try:
            content = pa.memory_map(str(path)).read_buffer()
            if xxhash.xxh3_64_digest(content[:-_DIGEST_BYTES]) != content[-_DIGEST_BYTES:].to_pybytes():
                return None
        except (pa.ArrowException, OSError):
            return None
        rows, records = _tables_of(content)
        skipped = _only_chunk(records, "skipped").to_numpy().copy()
        return cls(
            path=path,
            stats=EncodingStats(**json.loads(rows.schema.metadata[_STATS])),
            hashes=_only_chunk(rows, "hash").to_numpy().copy(),
            num_tokens=(pa.compute.binary_length(_only_chunk(rows, "ids")).to_numpy() // dtype.itemsize).astype(
                np.int32
            ),
            num_bytes=_only_chunk(rows, "num_bytes").to_numpy().astype(np.int32),
            num_documents=np.bincount(_only_chunk(rows, "record").to_numpy(), minlength=len(skipped)).astype(np.int32),
            skipped=skipped,
            held_out=_only_chunk(records, "held_out").to_numpy(zero_copy_only=False),
        )

    def take_ids(self, documents: pa.Array) -> pa.Array:
        """The ids of some documents, (num_documents,) large_binary."""
        return _mapped_columns(self.path)[0].take(documents)

    def take_sizes(self, documents: pa.Array, encoding: Encoding) -> pa.Array:
        """Bytes of text of each token of some documents, (num_documents,) large_binary of uint32."""
        sizes = _mapped_columns(self.path)[1]
        if sizes.null_count == 0:
            return sizes.take(documents)
        ids, ends = binary_values(self.take_ids(documents), encoding.dtype)
        return _as_binary(encoding.token_bytes.take(ids).astype(np.uint32), ends)


# What is mapped stays resident, and a document's page brings many others with it: 32 files are half a gigabyte at most.
@lru_cache(maxsize=32)
def _mapped_columns(path: Path) -> tuple[pa.Array, pa.Array]:
    """The ids and the sizes of an encoded partition, mapped from its file."""
    rows, _ = _tables_of(pa.memory_map(str(path)).read_buffer())
    return _only_chunk(rows, "ids"), _only_chunk(rows, "sizes")


def release_encoded() -> None:
    """Unmap the files."""
    _mapped_columns.cache_clear()


def _tables_of(content: pa.Buffer) -> tuple[pa.Table, pa.Table]:
    reader = pa.BufferReader(content)
    rows, records = (pa.ipc.open_stream(reader).read_all() for _ in range(2))
    return rows, records


def _only_chunk(table: pa.Table, name: str) -> pa.Array:
    return table.column(name).chunk(0)


def _as_binary(values: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> pa.Array:
    """Stretches of an array as binary values: (num_values,) and where each stretch begins -> large_binary."""
    buffers = [None, pa.py_buffer(offsets * values.itemsize), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def binary_values(values: pa.Array, dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The arrays behind binary values, one after the other, and where each begins: the inverse of how they are made."""
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int64, len(values) + 1, 8 * values.offset) // dtype.itemsize
    array = np.frombuffer(data, dtype)[ends[0] : ends[-1]] if data else np.empty(0, dtype)
    return array, ends - ends[0]


def _hashes(texts: pa.Array) -> npt.NDArray[np.uint64]:
    """64 bits of each text, (num_documents,). Among 10^8 texts one pair that differs is equal with probability 3e-4."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64, len(texts) + 1, 8 * texts.offset).tolist()
    view = memoryview(data) if data else memoryview(b"")
    digest = xxhash.xxh3_64_intdigest
    return np.array([digest(view[start:stop]) for start, stop in pairwise(ends)], np.uint64)

"""The documents of a split, in the split's order, from what was encoded in the order of the source."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from clm_dist.files.shards import Ids
from clm_dist.prepare.encoded import Encoded, binary_values
from clm_dist.prepare.encoding import Encoding

Rows = npt.NDArray[np.int64]
"""Numbers of records or of documents, (num_rows,)."""
Take = Callable[[Encoded, pa.Array], pa.Array]


@dataclass(frozen=True)
class Corpus:
    """The encoded partitions of a job as one sequence of records, and of documents."""

    encoded: Sequence[Encoded]
    partition_ends: Rows
    """Where the documents of each partition end, (num_partitions,)."""
    first_document: Rows
    """(num_records + 1,)"""
    num_tokens: npt.NDArray[np.int32]
    """(num_documents,)"""
    num_bytes: npt.NDArray[np.int32]
    """Bytes of text, (num_documents,)"""
    hashes: npt.NDArray[np.uint64]
    """(num_documents,)"""
    skipped: npt.NDArray[np.uint8]
    """(num_records,)"""
    held_out: npt.NDArray[np.bool_]
    """(num_records,)"""

    @classmethod
    def of_encoded(cls, encoded: Sequence[Encoded]) -> "Corpus":
        counts = np.concatenate([one.num_documents for one in encoded])
        return cls(
            encoded=encoded,
            partition_ends=np.cumsum([len(one.hashes) for one in encoded]),
            first_document=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            num_tokens=np.concatenate([one.num_tokens for one in encoded]),
            num_bytes=np.concatenate([one.num_bytes for one in encoded]),
            hashes=np.concatenate([one.hashes for one in encoded]),
            skipped=np.concatenate([one.skipped for one in encoded]),
            held_out=np.concatenate([one.held_out for one in encoded]),
        )

    def documents_of(self, records: Rows) -> Rows:
        """The documents of records, in the records' order."""
        first = self.first_document[records]
        counts = self.first_document[records + 1] - first
        begins = np.cumsum(counts) - counts
        documents: Rows = np.repeat(first - begins, counts) + np.arange(counts.sum())
        return documents

    def gather(self, documents: Rows, take: Take, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """The values of documents, one after the other.

        Args:
            take: returns some documents of an encoded partition, as large_binary of `dtype`.
        """
        partition_of = np.searchsorted(self.partition_ends, documents, side="right")
        grouped = np.argsort(partition_of, kind="stable")
        present, starts = np.unique(partition_of[grouped], return_index=True)
        taken = []
        for number, of_partition in zip(present.tolist(), np.split(grouped, starts[1:]), strict=True):
            one = self.encoded[number]
            first = self.partition_ends[number] - len(one.hashes)
            taken.append(take(one, pa.array(documents[of_partition] - first)))
        values = pa.concat_arrays(taken)
        if len(taken) > 1:
            # Back from the order of the partitions to that of the documents.
            place = np.empty_like(grouped)
            place[grouped] = np.arange(len(grouped))
            values = values.take(pa.array(place))
        return binary_values(values, dtype)[0]


@dataclass(frozen=True)
class SplitDocuments:
    """A split's documents in the order of its token stream, in chunks."""

    chunks: Sequence[Rows]
    """With `grouping: guide` one for every 1,000 records, whose remainder is dropped; else of any size."""
    num_skipped: dict[str, int]
    num_duplicates: int
    num_repeated: int

    @property
    def documents(self) -> Rows:
        return np.concatenate([np.empty(0, np.int64), *self.chunks])


def token_stream(corpus: Corpus, split: SplitDocuments, dtype: np.dtype[Any]) -> Iterator[Ids]:
    """The ids of each chunk of a split."""
    for chunk in split.chunks:
        yield corpus.gather(chunk, lambda one, documents: one.take_ids(documents), dtype)


def size_stream(corpus: Corpus, split: SplitDocuments, encoding: Encoding) -> Iterator[npt.NDArray[np.uint32]]:
    """The bytes of text that each id of each chunk of a split stands for."""
    for chunk in split.chunks:
        yield corpus.gather(chunk, lambda one, documents: one.take_sizes(documents, encoding), np.dtype(np.uint32))


def document_lengths(corpus: Corpus, documents: Rows) -> dict[str, int]:
    """How many documents have up to 1, 2, 4, 8, ... tokens."""
    exponents = np.ceil(np.log2(np.maximum(corpus.num_tokens[documents], 1))).astype(np.int64)
    return {str(2**exponent): int(count) for exponent, count in enumerate(np.bincount(exponents)) if count}

"""The documents of a split from the parts, in the split's order: what was encoded in the order of the source."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from clm_dist.config.data import DataConfig
from clm_dist.errors import DataError
from clm_dist.files.blocks import Ids
from clm_dist.prepare.documents import Skip
from clm_dist.prepare.parts import Part, binary_values
from clm_dist.prepare.sources import Slice
from clm_dist.prepare.tokens import Encoding

Rows = npt.NDArray[np.int64]
"""Numbers of records or of documents, (num_rows,)."""
Take = Callable[[Part, pa.Array], pa.Array]

GUIDE_RECORDS = 1000
"""The batch of `datasets.map`, whose remainders the guide drops."""
_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """The parts of a job as one sequence of records, and of documents."""

    parts: Sequence[Part]
    part_ends: Rows
    """Where the documents of each part end, (num_parts,)."""
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
    def of_parts(cls, parts: Sequence[Part]) -> "Corpus":
        counts = np.concatenate([part.num_documents for part in parts])
        return cls(
            parts=parts,
            part_ends=np.cumsum([len(part.hashes) for part in parts]),
            first_document=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            num_tokens=np.concatenate([part.num_tokens for part in parts]),
            num_bytes=np.concatenate([part.num_bytes for part in parts]),
            hashes=np.concatenate([part.hashes for part in parts]),
            skipped=np.concatenate([part.skipped for part in parts]),
            held_out=np.concatenate([part.held_out for part in parts]),
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
            take: what gives a part's documents as large_binary of `dtype`.
        """
        part_of = np.searchsorted(self.part_ends, documents, side="right")
        grouped = np.argsort(part_of, kind="stable")
        present, starts = np.unique(part_of[grouped], return_index=True)
        taken = []
        for number, of_part in zip(present.tolist(), np.split(grouped, starts[1:]), strict=True):
            part = self.parts[number]
            first = self.part_ends[number] - len(part.hashes)
            taken.append(take(part, pa.array(documents[of_part] - first)))
        values = pa.concat_arrays(taken)
        if len(taken) > 1:
            # Back from the order of the parts to that of the documents.
            place = np.empty_like(grouped)
            place[grouped] = np.arange(len(grouped))
            values = values.take(pa.array(place))
        return binary_values(values, dtype)[0]


def split_records(held_out: npt.NDArray[np.bool_], rows: Slice, data: DataConfig) -> dict[str, Rows]:
    """The records of the `train` and the `eval` split, in the order in which they are concatenated.

    Args:
        held_out: for each record of the source whether the hash split holds it out, (num_records,).

    Raises:
        DataError: one of the splits would have no record.
    """
    held_out = held_out[rows.start : rows.stop]
    num_records = len(held_out)
    if num_records == 0:
        raise no_records(rows)
    if data.split_method == "hash":
        splits = {"train": np.flatnonzero(~held_out), "eval": np.flatnonzero(held_out)}
    else:
        splits = _random_split(num_records, data)
    if not all(map(len, splits.values())):
        raise DataError(
            f"data.eval_fraction {data.eval_fraction} cannot split {num_records} records: one of the splits would be "
            "empty; take more records, or change data.eval_fraction or data.split_method",
            field="data.eval_fraction",
        )
    return {name: records + rows.start for name, records in splits.items()}


def no_records(rows: Slice) -> DataError:
    return DataError(f"data.split {rows.spec} has no records; take a larger part", field="data.split")


def _random_split(num_records: int, data: DataConfig) -> dict[str, Rows]:
    """Row for row the split of `datasets.train_test_split`."""
    # As `Dataset.train_test_split` of datasets 5.2 has it, in a hundredth of its time; a test holds the two together.
    num_eval = math.ceil(data.eval_fraction * num_records)
    num_train = math.floor((1 - data.eval_fraction) * num_records)
    shuffled = np.random.default_rng(data.seed).permutation(num_records)
    return {"train": shuffled[num_eval : num_eval + num_train], "eval": shuffled[:num_eval]}


@dataclass(frozen=True)
class SplitDocuments:
    """A split's documents in the order of its token stream, in chunks."""

    chunks: Sequence[Rows]
    """With `grouping: guide` one for every 1,000 records, whose remainder is dropped; else of any size."""
    num_skipped: dict[str, int]
    num_duplicates: int

    @property
    def documents(self) -> Rows:
        return np.concatenate([np.empty(0, np.int64), *self.chunks])


def split_documents(corpus: Corpus, records: Rows, data: DataConfig, evaluated: Rows | None = None) -> SplitDocuments:
    """The documents of a split's records.

    Args:
        evaluated: the records of the eval split, where this is the train split: documents that it has too are
            counted, and with `data.deduplicate` left out.
    """
    documents = corpus.documents_of(records)
    kept = np.ones(len(documents), bool)
    num_duplicates = 0
    if evaluated is not None:
        twice = np.isin(corpus.hashes[documents], corpus.hashes[corpus.documents_of(evaluated)])
        num_duplicates = int(np.count_nonzero(twice))
        if data.deduplicate:
            kept = ~twice
    counts = corpus.first_document[records + 1] - corpus.first_document[records]
    owner = np.repeat(np.arange(len(records)), counts)
    left = np.bincount(owner[kept], minlength=len(records))
    reasons = corpus.skipped[records]
    num_skipped = {
        "empty": int(np.count_nonzero(reasons == Skip.EMPTY)),
        "low_score": int(np.count_nonzero(reasons == Skip.LOW_SCORE)),
        "duplicate": int(np.count_nonzero((reasons == Skip.USED) & (left == 0))),
    }
    ends = np.cumsum(left)
    if data.grouping == "guide":
        cuts = ends[GUIDE_RECORDS - 1 :: GUIDE_RECORDS]
    else:
        tokens = np.cumsum(corpus.num_tokens[documents[kept]], dtype=np.int64)
        total = int(tokens[-1]) if len(tokens) else 0
        cuts = np.searchsorted(tokens, np.arange(_CHUNK_TOKENS, total, _CHUNK_TOKENS))
    chunks = np.split(documents[kept], cuts)
    return SplitDocuments([chunk for chunk in chunks if len(chunk)], num_skipped, num_duplicates)


def token_stream(corpus: Corpus, split: SplitDocuments, dtype: np.dtype[Any]) -> Iterator[Ids]:
    """The ids of each chunk of a split."""
    for chunk in split.chunks:
        yield corpus.gather(chunk, lambda part, documents: part.take_ids(documents), dtype)


def size_stream(corpus: Corpus, split: SplitDocuments, encoding: Encoding) -> Iterator[npt.NDArray[np.uint32]]:
    """The bytes of text that each id of each chunk of a split stands for."""
    for chunk in split.chunks:
        yield corpus.gather(chunk, lambda part, documents: part.take_sizes(documents, encoding), np.dtype(np.uint32))


def document_lengths(corpus: Corpus, documents: Rows) -> dict[str, int]:
    """How many documents have up to 1, 2, 4, 8, ... tokens."""
    exponents = np.ceil(np.log2(np.maximum(corpus.num_tokens[documents], 1))).astype(np.int64)
    return {str(2**exponent): int(count) for exponent, count in enumerate(np.bincount(exponents)) if count}

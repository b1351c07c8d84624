"""The documents of a source with the tokens of each, for a model that is evaluated on them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clm_dist.config.data import DataConfig
from clm_dist.errors import DataError
from clm_dist.prepare.documents import Skip, documents_of, values_of
from clm_dist.prepare.encode import Effort, count_records
from clm_dist.prepare.encoding import Encoding, completed
from clm_dist.prepare.engines import Reference
from clm_dist.prepare.partitions import read_partition
from clm_dist.prepare.sources import open_source
from clm_dist.prepare.token_bytes import token_sizes
from clm_dist.progress import Progress

_NO_CATEGORY = "(none)"


@dataclass(frozen=True)
class Texts:
    """Documents as ids, one after the other."""

    ids: npt.NDArray[np.uint32]
    """(num_tokens,), with the special tokens that the tokenizer puts around a text."""
    offsets: npt.NDArray[np.int64]
    """Where each document begins, and where the last one ends, (num_documents + 1,)."""
    num_bytes: npt.NDArray[np.int64]
    """Bytes of text of all tokens of a document but its first, (num_documents,)."""
    categories: list[str] | None
    """That of each document, where it was asked for."""
    num_records: int
    num_skipped: dict[str, int]
    """Records without a document, by reason."""


def read_texts(data: DataConfig, tokenizer: Any, progress: Progress, *, category: str | None = None) -> Texts:
    """Read and encode all documents of a source.

    Args:
        category: dotted path of the field with a record's category.

    Raises:
        ConfigError, DataError: the source is not reachable or broken, has no text, or has no such field.
    """
    encoding = Encoding.of_tokenizer(tokenizer, data.model_copy(update={"append_eos": False}))
    engine = Reference(encoding.tokenizer_json)
    ids, sizes, categories = [np.empty(0, np.uint32)], [np.zeros(1, np.int64)], list[str]()
    num_bytes = [np.empty(0, np.int64)]
    skipped = dict.fromkeys(Skip, 0)
    num_records = 0
    progress.start("Reading records")
    for table in _tables(data, category):
        documents = documents_of(table, data)
        num_records += len(table)
        for reason in Skip:
            skipped[reason] += int((documents.skipped == reason).sum())
        tokens = completed(engine.encode(documents.texts, parallel=True), encoding)
        exact = token_sizes(tokens, documents.texts, encoding)
        bytes_of_tokens = encoding.token_bytes.take(tokens.ids) if exact is None else exact
        ends = np.concatenate([[0], np.cumsum(bytes_of_tokens, dtype=np.int64)])
        # A document's first token is not predicted.
        num_bytes.append(ends[tokens.offsets[1:]] - ends[np.minimum(tokens.offsets[:-1] + 1, tokens.offsets[1:])])
        ids.append(tokens.ids.astype(np.uint32))
        sizes.append(np.diff(tokens.offsets))
        if category is not None:
            of_record = _categories(table, category)
            categories += [of_record[record] for record in documents.records.tolist()]
    texts = Texts(
        ids=np.concatenate(ids),
        offsets=np.cumsum(np.concatenate(sizes)),
        num_bytes=np.concatenate(num_bytes),
        categories=None if category is None else categories,
        num_records=num_records,
        num_skipped={reason.name.lower(): count for reason, count in skipped.items() if count and reason},
    )
    if len(texts.offsets) == 1:
        raise DataError(
            f"data.text {data.text} is empty in all {num_records:,} records of data.path {data.path}; name the field "
            "that holds the text",
            field="data.text",
        )
    return texts


def _tables(data: DataConfig, category: str | None) -> Iterator[pa.Table]:
    """The records of the source, with the columns that are read."""
    if category is not None:
        # The field that the split by hash reads is one more column, of any type.
        data = data.model_copy(update={"id": category, "split_method": "hash"})
    try:
        effort = Effort()
        source = open_source(data)
        if source.slice.is_relative:
            source = source.narrowed(count_records(source, effort), effort.partition_bytes)
        begin, end, passed = source.slice.start, source.slice.stop, 0
        for partition in source.partitions(effort.partition_bytes):
            table = read_partition(partition, data)
            start = min(max(0, begin - passed), len(table))
            stop = len(table) if end is None else min(max(0, end - passed), len(table))
            passed += len(table)
            yield table.slice(start, max(0, stop - start))
            if end is not None and passed >= end:
                break
    except DataError as error:
        if category is None or error.field != "data.id":
            raise
        message = (
            str(error).replace(f"data.id {category}", f"--by {category}").removesuffix("; null hashes the text instead")
        )
        raise DataError(message) from None


def _categories(table: pa.Table, path: str) -> list[str]:
    """The category of each record. Raises DataError where a record has several."""
    found = values_of(table, path)
    if found.nested:
        raise DataError(f"--by {path} is a list in each record; name a field with one value")
    return [_NO_CATEGORY if value is None else str(value) for value in found.values.to_pylist()]

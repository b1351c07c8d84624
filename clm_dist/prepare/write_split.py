"""A split's blocks, gathered from the encoded partitions and written as shards."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clm_dist.config.job import JobConfig
from clm_dist.errors import DataError
from clm_dist.files.atomic import whole_file
from clm_dist.files.blocks import EVAL_BYTES, Split
from clm_dist.files.shards import Ids, write_shards
from clm_dist.prepare.corpus import Corpus, SplitDocuments, document_lengths, size_stream, token_stream
from clm_dist.prepare.documents import no_text
from clm_dist.prepare.encoding import Encoding
from clm_dist.prepare.group import blocks_of
from clm_dist.prepare.pools import ahead


def write_split(
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
        raise no_text(job, num_records, f"the {name} split")
    if num_tokens < block_size:
        mend = "take more records or lower data.block_size"
        if not job.data.has_own_eval:
            mend = "take more records, lower data.block_size or change data.eval_fraction"
        raise DataError(
            f"the {name} split has {num_tokens} tokens ({num_records} records), less than one block of "
            f"{block_size}; {mend}",
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
        num_repeated=split.num_repeated,
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

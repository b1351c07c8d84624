"""Which records and documents are in which split, in the split's order."""

import math

import numpy as np
import numpy.typing as npt

from clm_dist.config.data import DataConfig
from clm_dist.errors import DataError
from clm_dist.prepare.corpus import Corpus, Rows, SplitDocuments
from clm_dist.prepare.documents import Skip
from clm_dist.prepare.sources import Slice

GUIDE_RECORDS = 1000
"""The batch of `datasets.map`, whose remainders the guide drops."""
_CHUNK_TOKENS = 1 << 22


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


def records_of(rows: Slice, num_records: int) -> Rows:
    """The records of a source that its slice takes, in their order. Raises DataError where there are none."""
    records = np.arange(num_records)[rows.start : rows.stop]
    if not len(records):
        raise no_records(rows)
    return records


def no_records(rows: Slice) -> DataError:
    return DataError(f"data.split {rows.spec} has no records; take a larger part", field="data.split")


def _random_split(num_records: int, data: DataConfig) -> dict[str, Rows]:
    """Row for row the split of `datasets.train_test_split`."""
    # As `Dataset.train_test_split` of datasets 5.2 has it, in a hundredth of its time; a test holds the two together.
    num_eval = math.ceil(data.eval_fraction * num_records)
    num_train = math.floor((1 - data.eval_fraction) * num_records)
    shuffled = np.random.default_rng(data.seed).permutation(num_records)
    return {"train": shuffled[num_eval : num_eval + num_train], "eval": shuffled[:num_eval]}


def split_documents(corpus: Corpus, records: Rows, data: DataConfig, evaluated: Rows | None = None) -> SplitDocuments:
    """The documents of a split's records.

    Args:
        evaluated: the records of the eval split, where this is the train split: documents that it has too, and those
            that repeat an earlier one, are counted, and with `data.deduplicate` removed.
    """
    documents = corpus.documents_of(records)
    kept = np.ones(len(documents), bool)
    of_eval, repeated = np.zeros((2, len(documents)), bool)
    if evaluated is not None:
        hashes = corpus.hashes[documents]
        of_eval = np.isin(hashes, corpus.hashes[corpus.documents_of(evaluated)])
        repeated = _is_repeated(hashes) & ~of_eval
        if data.deduplicate:
            kept = ~(of_eval | repeated)
    counts = corpus.first_document[records + 1] - corpus.first_document[records]
    owner = np.repeat(np.arange(len(records)), counts)
    left = np.bincount(owner[kept], minlength=len(records))
    reasons = corpus.skipped[records]
    num_skipped = {
        "empty": int(np.count_nonzero(reasons == Skip.EMPTY)),
        "low_score": int(np.count_nonzero(reasons == Skip.LOW_SCORE)),
        "duplicate": int(np.count_nonzero((reasons == Skip.USED) & (left == 0))),
    }
    if data.deduplicate:
        # Of their documents one or more are not in the eval split.
        emptied = np.bincount(owner[repeated], minlength=len(records))[left == 0]
        num_skipped["repeated"] = int(np.count_nonzero(emptied))
        num_skipped["duplicate"] -= num_skipped["repeated"]
    ends = np.cumsum(left)
    if data.grouping == "guide":
        cuts = ends[GUIDE_RECORDS - 1 :: GUIDE_RECORDS]
    else:
        tokens = np.cumsum(corpus.num_tokens[documents[kept]], dtype=np.int64)
        total = int(tokens[-1]) if len(tokens) else 0
        cuts = np.searchsorted(tokens, np.arange(_CHUNK_TOKENS, total, _CHUNK_TOKENS))
    chunks = np.split(documents[kept], cuts)
    return SplitDocuments(
        chunks=[chunk for chunk in chunks if len(chunk)],
        num_skipped=num_skipped,
        num_duplicates=int(np.count_nonzero(of_eval)),
        num_repeated=int(np.count_nonzero(repeated)),
    )


def _is_repeated(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Whether a document has the hash of one before it, (num_documents,)."""
    repeated = np.ones(len(hashes), bool)
    repeated[np.unique(hashes, return_index=True)[1]] = False
    return repeated

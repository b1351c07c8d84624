"""A tokenizer trained on the job's own text."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clm_dist.config.data import TokenizerTraining
from clm_dist.config.job import JobConfig
from clm_dist.files.atomic import writing
from clm_dist.prepare.documents import documents_of, held_out, no_text
from clm_dist.prepare.encode import PARTITION_BYTES
from clm_dist.prepare.partitions import read_partition
from clm_dist.prepare.sources import Source
from clm_dist.prepare.splits import records_of, split_records

_EOS = "<|endoftext|>"


def train_tokenizer(documents: Iterable[str], training: TokenizerTraining, directory: Path) -> None:
    """Train a byte-level BPE tokenizer and write it; the same documents give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=training.vocab_size,
        special_tokens=[_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS, bos_token=_EOS)
    fast.save_pretrained(directory)


def _train_records(job: JobConfig, source: Source) -> npt.NDArray[np.bool_]:
    """Which records of the source, up to the last that the job takes, are in the train split."""
    sides = [np.empty(0, bool)]
    for partition in source.partitions(PARTITION_BYTES):
        table = read_partition(partition, job.data)
        sides.append(held_out(table, job.data) if job.data.splits_by_hash else np.zeros(len(table), bool))
        if source.slice.stop is not None and sum(map(len, sides)) >= source.slice.stop:
            break
    of_eval = np.concatenate(sides)
    train = np.zeros(len(of_eval), bool)
    if job.data.has_own_eval:
        train[records_of(source.slice, len(train))] = True
    else:
        train[split_records(of_eval, source.slice, job.data)["train"]] = True
    return train


def train_own_tokenizer(job: JobConfig, source: Source, directory: Path) -> None:
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
        raise no_text(job, int(np.count_nonzero(records)), "the train split")
    unfinished = directory.with_suffix(".part")
    with writing(directory):
        train_tokenizer(texts(), job.tokenizer.train, unfinished)
        unfinished.rename(directory)

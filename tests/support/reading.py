"""Reads a job's records whole, as the tests want to look at them."""

import pyarrow as pa

from clm_dist.config.data import DataConfig
from clm_dist.prepare.documents import documents_of
from clm_dist.prepare.partitions import read_partition
from clm_dist.prepare.sources import open_source

LARGE = 1 << 24
EMPTY_FILES = {"a.txt": "", "a.jsonl": "", "b.jsonl": "\n", "a.json": "[]", "a.csv": "", "b.csv": "text\n"}


def load_records(data: DataConfig, size: int = LARGE) -> pa.Table:
    """The records of the job's split, read in partitions of about `size` bytes."""
    source = open_source(data)
    tables = [read_partition(partition, data) for partition in source.partitions(size)]
    table = pa.concat_tables(tables, promote_options="default") if tables else pa.table({})
    rows = source.slice.of_total(len(table)) if source.slice.is_relative else source.slice
    return table[rows.start : rows.stop]


def texts_of(table: pa.Table, data: DataConfig) -> list[list[str]]:
    """The documents of each record."""
    documents = documents_of(table, data)
    texts: list[list[str]] = [[] for _ in range(len(table))]
    for record, text in zip(documents.records.tolist(), documents.texts.to_pylist(), strict=True):
        texts[record].append(text)
    return texts

"""A partition: consecutive records of a source, which one task holds in memory."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from clm_dist.prepare.data_file import DataFile


@dataclass(frozen=True)
class Partition:
    """Consecutive records of a source; `read_partition` reads them, in this process or in another."""

    where: str
    """The file or data set, for messages."""
    num_bytes: int
    """How much of the source it stands for, for progress."""
    file: DataFile | None = None
    start: int = 0
    """Bytes of which the task reads the lines or paragraphs that count for them; or row groups of a Parquet file."""
    stop: int = 0
    content: pa.Table | pa.Buffer | None = None
    """Records, or whole lines, that are read already."""
    first: int = 1
    """Number of the first line of the content, or of the first record where it does not consist of lines."""
    unit: Literal["line", "record"] = "line"
    schema: pa.Schema | None = None
    """Types of the fields that the job reads in records of JSON."""
    files: tuple[DataFile, ...] = ()
    """Files of which each is a record."""

"""Shards: files of blocks, Arrow IPC streams that are mapped with no copy."""

import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clm_dist.errors import DataError
from clm_dist.files.atomic import whole_file, writing
from clm_dist.files.hashes import file_sha256

SHARD_TOKENS = 2**24
"""Tokens in a full shard: 32 MiB of uint16."""

Ids = npt.NDArray[np.unsignedinteger[Any]]
"""Token ids, uint16 or uint32."""
TokenBytes = npt.NDArray[np.uint16]
"""Bytes of text that each token stands for, (vocab_size,); 0 for special tokens."""


@dataclass(frozen=True)
class Shard:
    """A shard's file, relative to the store, and what it holds."""

    file: str
    num_blocks: int
    sha256: str


def token_dtype(num_ids: int) -> np.dtype[Any]:
    """The smallest type that holds every token id: uint16 up to 65,536 ids, else uint32.

    Raises:
        DataError: there are more than 2^32 ids.
    """
    if num_ids > 2**32:
        raise DataError(
            f"the tokenizer has {num_ids:,} ids, and a store holds ids below 2^32; use a smaller vocabulary",
            field="tokenizer.path",
        )
    return np.dtype(np.uint16 if num_ids <= 2**16 else np.uint32)


def write_shards(store: Path, split: str, blocks: Iterable[Ids], block_size: int, dtype: np.dtype[Any]) -> list[Shard]:
    """Write a split's blocks as shards of at most SHARD_TOKENS tokens, each whole or not there.

    Args:
        blocks: arrays of shape (num_blocks, block_size), in order; where they are cut does not change the shards.
    """
    directory = store / split
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1, thread_name_prefix="shards") as thread:
        # While one shard is written and hashed, the next is put together; no more than these two are held.
        waiting: list[Future[Shard]] = []
        shards = []
        for index, ids in enumerate(_regroup(blocks, max(1, SHARD_TOKENS // block_size), dtype)):
            shards += [future.result() for future in waiting]
            waiting = [thread.submit(_write_shard, store, f"{split}/{index:05d}.arrow", ids)]
        return shards + [future.result() for future in waiting]


def _write_shard(store: Path, name: str, ids: Ids) -> Shard:
    """Write blocks, (num_blocks, block_size), as one shard."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), ids.shape[1])
    batch = pa.record_batch([column], names=["input_ids"])
    # Existing mappings of a shard of that name stay valid.
    with whole_file(store / name) as part:
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
        with part.open("rb+") as written:
            # No power cut that a manifest outlives takes its shards.
            os.fsync(written.fileno())
        return Shard(name, len(ids), file_sha256(part))


class MappedShard:
    """A shard's blocks, (num_blocks, block_size), as they lie in its file."""

    def __init__(self, path: Path, block_size: int, *, shuffled: bool) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            whole = pa.py_buffer(self._map)
            with pa.ipc.open_stream(pa.BufferReader(whole)) as reader:
                column = reader.read_all().column("input_ids")
        except (OSError, ValueError, KeyError) as error:
            raise unreadable(path, error) from None
        if shuffled:
            self._map.madvise(mmap.MADV_RANDOM)
        values = column.chunk(0).values.to_numpy(zero_copy_only=True)
        self.ids: Ids = values.reshape(-1, block_size)
        self._begin = self.ids.ctypes.data - whole.address

    def will_need(self, rows: npt.NDArray[np.int64]) -> None:
        """Let the system begin to read rows."""
        row_bytes = self.ids.strides[0]
        for begin in (self._begin + rows * row_bytes).tolist():
            page = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, begin + row_bytes - page)


def _regroup(arrays: Iterable[Ids], rows: int, dtype: np.dtype[Any]) -> Iterator[Ids]:
    """The same rows in arrays of `rows` each, the last one shorter."""
    held: Ids | None = None
    num_held = 0
    for array in arrays:
        while len(array):
            if held is None:
                held = np.empty((rows, array.shape[1]), dtype)
            taken = array[: rows - num_held]
            held[num_held : num_held + len(taken)] = taken
            num_held += len(taken)
            array = array[len(taken) :]
            if num_held == rows:
                yield held
                held, num_held = None, 0
    if held is not None:
        yield held[:num_held]


def unreadable(path: Path, problem: object) -> DataError:
    return DataError(f"cannot read the shard {path}: {problem}; remove its store to prepare again")

"""Shards: files of blocks, Arrow IPC streams that are mapped with no copy."""

import ctypes
import functools
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
    """A shard's file in memory. It stays there if the file is removed, and keeps no file open.

    Args:
        shuffled: whether rows are read in no order, so that the system need not read what lies around them.

    Raises:
        DataError: the file cannot be read, or is shorter than `num_bytes`.
    """

    def __init__(self, path: Path, block_size: int, *, num_bytes: int, shuffled: bool = False) -> None:
        self._path, self._block_size = path, block_size
        try:
            with pa.memory_map(str(path)) as file:
                # Of what is asked for, Arrow makes the system read the beginning, a MiB or so of each shard.
                first = file.read_buffer(1)
                self._whole = pa.foreign_buffer(first.address, file.size(), first)
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from None
        if self._whole.size < num_bytes:
            raise _unreadable(path, f"it has {self._whole.size:,} bytes, and its blocks have {num_bytes:,}")
        if shuffled:
            self._advise(mmap.MADV_RANDOM, 0, self._whole.size)

    @functools.cached_property
    def ids(self) -> Ids:
        """Its blocks, (num_blocks, block_size), as they lie in the file. Raises DataError where it is no shard."""
        try:
            with pa.ipc.open_stream(pa.BufferReader(self._whole)) as reader:
                column = reader.read_all().column("input_ids")
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(self._path, error) from None
        values = column.chunk(0).values.to_numpy(zero_copy_only=True)
        ids: Ids = values.reshape(-1, self._block_size)
        return ids

    def will_need(self, rows: npt.NDArray[np.int64]) -> None:
        """Let the system begin to read rows."""
        first, row_bytes = self.ids.ctypes.data - self._whole.address, self.ids.strides[0]
        for begin in (first + rows * row_bytes).tolist():
            page = begin - begin % mmap.PAGESIZE
            self._advise(mmap.MADV_WILLNEED, page, begin + row_bytes - page)

    def _advise(self, advice: int, start: int, num_bytes: int) -> None:
        # Python's own mmap keeps the file open. It is a hint: where it is not taken, nothing is lost.
        if _madvise is not None:
            _madvise(ctypes.c_void_p(self._whole.address + start), ctypes.c_size_t(num_bytes), advice)


_madvise = getattr(ctypes.CDLL(None), "madvise", None)


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


def _unreadable(path: Path, problem: object) -> DataError:
    return DataError(f"cannot read the shard {path}: {problem}; remove its store to prepare again")

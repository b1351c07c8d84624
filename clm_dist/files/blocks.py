"""Blocks of token ids on disk: Arrow shards that numpy maps with no copy, and the manifest that names them.

A store's directory holds `manifest.json`, `tokenizer/` and one directory of shards a split. A shard is an Arrow IPC
stream, as `datasets` writes them, with one column `input_ids: fixed_size_list<uint16|uint32>[block_size]`. Beside the
eval split's shards lies `eval/bytes.npy`, (num_blocks, 2) int64: the bytes of text of the tokens that a block predicts,
and of those that it predicts with `data.document_mask`.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from clm_dist.errors import DataError
from clm_dist.files.atomic import write_json
from clm_dist.files.shards import Ids, MappedShard, Shard

FORMAT_VERSION = 2
_MOST_MAPPED = 2**14
"""Shards that are mapped at once. Linux lets a process have 65,530 mappings (`vm.max_map_count`), and a worker opens
two splits. Full shards of so many hold 2.7 x 10^11 tokens."""
EVAL_BYTES = "eval/bytes.npy"
"""File with the bytes of text that each eval block stands for."""


@dataclass(frozen=True)
class Split:
    """Counts of a split's records, documents, tokens and blocks.

    Records are used or skipped; tokens are in blocks or dropped: num_tokens = num_blocks x block_size +
    num_dropped_tokens.
    """

    num_records: int
    num_skipped: dict[str, int]
    """Records that gave no document, by reason: empty, low_score, duplicate (all of it is in the eval split as well);
    with `data.deduplicate` also repeated."""
    num_documents: int
    """Documents in the token stream."""
    num_duplicates: int
    """Documents of the train split that the eval split has to the letter; `data.deduplicate` removes them."""
    num_text_bytes: int
    num_tokens: int
    num_blocks: int
    num_dropped_tokens: int
    num_document_ends: int
    """End-of-sequence tokens in the blocks but for their last tokens; 0 where documents have no ends."""
    document_lengths: dict[str, int]
    """How many documents have up to 1, 2, 4, 8, ... tokens."""
    shards: tuple[Shard, ...]
    num_repeated: int | None = None
    """Documents of the train split that repeat an earlier one of it, and that the eval split does not have;
    `data.deduplicate` removes them. None where a version that did not count them wrote the store."""

    def num_predicted(self, block_size: int, *, document_mask: bool) -> int:
        """Tokens that the blocks predict: not a block's first, nor with the mask one after a document's end."""
        return self.num_blocks * (block_size - 1) - (self.num_document_ends if document_mask else 0)


@dataclass(frozen=True)
class Manifest:
    """The content of a store, and what it was made from."""

    fingerprint: str
    origin: str
    """Where the records came from, for people."""
    source: dict[str, Any]
    """All that the fingerprint stands for."""
    block_size: int
    dtype: str
    engine: str
    """The tokenizer engine that ran."""
    tokenizer_fingerprint: str
    splits: dict[str, Split]
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of every other file of the store."""
    tokens_per_word: float | None = None
    """In a sample of the train split; None where a version that did not measure it wrote the store."""
    format_version: int = FORMAT_VERSION

    def sha256_of_files(self) -> dict[str, str]:
        """The sha256 that each file of the store must have, by its name in the store."""
        shards = (shard for split in self.splits.values() for shard in split.shards)
        return {shard.file: shard.sha256 for shard in shards} | self.files

    def without_files(self) -> "Manifest":
        """The same manifest with counts alone, whose size does not depend on that of the data."""
        splits = {name: replace(split, shards=()) for name, split in self.splits.items()}
        return replace(self, splits=splits, files={})

    def write(self, path: Path) -> None:
        values = asdict(self)
        write_json(path, values | {"sha256": _sha256_of(values)})

    @staticmethod
    def is_as_written(path: Path) -> bool:
        """Whether nothing in a manifest was changed since it was written."""
        values = json.loads(path.read_text(encoding="utf-8"))
        sha256 = values.pop("sha256", None)
        return bool(sha256 == _sha256_of(values))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises DataError where the manifest is of a newer format or does not parse."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no manifest ({error}); remove {path.parent} to prepare again") from None
        if version != FORMAT_VERSION:
            age = "a newer" if isinstance(version, int) and version > FORMAT_VERSION else "another"
            raise DataError(
                f"{path} has format {version} of {age} version of clm-dist, this one reads {FORMAT_VERSION}; "
                f"use the version that wrote it, or remove {path.parent} to prepare again"
            )
        try:
            splits = {
                name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
                for name, split in values.pop("splits").items()
            }
            values.pop("sha256", None)
            return cls(splits=splits, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no whole manifest ({error}); remove {path.parent} to prepare again") from None


class Blocks:
    """The blocks of a split; indexing copies just the rows that are asked for.

    All shards are mapped at once, and parsed where they are first read from. Of more shards than a process may map
    those stay mapped that were read from last.

    Args:
        shuffled: whether blocks are read in no order, so that the system need not read what lies around them.
        manifest: of a store whose manifest is not written yet.

    Raises:
        DataError: here or where blocks are read, a shard is not as it was written.
    """

    def __init__(self, store: Path, split: str, *, shuffled: bool = False, manifest: Manifest | None = None) -> None:
        manifest = manifest or Manifest.read(store / "manifest.json")
        self.block_size = manifest.block_size
        self._store = store
        self._shards = shards = manifest.splits[split].shards
        block_size = manifest.block_size
        self._ends = np.cumsum([shard.num_blocks for shard in self._shards])
        row_bytes = manifest.block_size * np.dtype(manifest.dtype).itemsize

        @functools.lru_cache(maxsize=_MOST_MAPPED)
        def mapped(number: int) -> MappedShard:
            shard = shards[number]
            size = shard.num_blocks * row_bytes
            return MappedShard(store / shard.file, block_size, num_bytes=size, shuffled=shuffled)

        self._mapped = mapped
        for number in range(len(shards)):
            # Each is there, and has its size.
            mapped(number)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Blocks by index: (n,) -> (n, block_size) int64."""
        rows = np.empty((len(indices), self.block_size), dtype=np.int64)
        for number, here, rows_there in self._places(indices):
            rows[here] = self._ids_of(number)[rows_there]
        return rows

    def will_need(self, indices: npt.NDArray[np.int64]) -> None:
        """Let the system begin to read blocks, so that they are in memory when they are asked for."""
        for number, _, rows_there in self._places(indices):
            self._mapped(number).will_need(rows_there)

    def _places(
        self, indices: npt.NDArray[np.int64]
    ) -> Iterator[tuple[int, npt.NDArray[np.bool_], npt.NDArray[np.int64]]]:
        """For each shard that has some: its number, which of the indices are there, and their rows in it."""
        shard_of = np.searchsorted(self._ends, indices, side="right")
        for number in map(int, np.unique(shard_of)):
            here = shard_of == number
            yield number, here, indices[here] - (self._ends[number] - self._shards[number].num_blocks)

    def highest_id(self) -> int:
        """Reads all blocks."""
        shards = (self._ids_of(number) for number in range(len(self._shards)))
        return max(int(ids.max()) for ids in shards if len(ids))

    def check(self) -> None:
        """Parse every shard. Raise DataError where one does not hold what the manifest says."""
        for number in range(len(self._shards)):
            self._ids_of(number)

    def _ids_of(self, number: int) -> Ids:
        shard, ids = self._shards[number], self._mapped(number).ids
        if len(ids) != shard.num_blocks:
            raise DataError(
                f"{self._store / shard.file} holds {len(ids)} blocks, its manifest says {shard.num_blocks}; remove "
                f"{self._store} to prepare again"
            )
        return ids


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

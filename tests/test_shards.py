"""Shards and their manifest."""

import ctypes
import json
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from clm_dist.errors import DataError
from clm_dist.files import shards
from clm_dist.files.blocks import Blocks, Manifest, Split
from clm_dist.files.shards import Ids, token_dtype, write_shards


def store_of(path: Path, blocks: Ids, pieces: int = 1) -> Path:
    """A store with one split, written in so many pieces."""
    written = write_shards(path, "train", np.array_split(blocks, pieces), blocks.shape[1], blocks.dtype)
    split = Split(
        num_records=1,
        num_skipped={},
        num_documents=1,
        num_text_bytes=1,
        num_tokens=blocks.size,
        num_blocks=len(blocks),
        num_dropped_tokens=0,
        num_document_ends=0,
        num_duplicates=0,
        document_lengths={},
        shards=tuple(written),
    )
    Manifest("f", "a test", {}, blocks.shape[1], str(blocks.dtype), "tokenizers", "t", {"train": split}).write(
        path / "manifest.json"
    )
    return path


@pytest.fixture
def blocks() -> Ids:
    return np.random.default_rng(0).integers(0, 50257, (1000, 16)).astype(np.uint16)


def test_blocks_come_back_in_any_order_from_several_shards(
    tmp_path: Path,
    blocks: Ids,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300 * 16)
    store = store_of(tmp_path, blocks)
    assert [s.num_blocks for s in Manifest.read(store / "manifest.json").splits["train"].shards] == [300, 300, 300, 100]
    read = Blocks(store, "train")
    assert len(read) == 1000
    order = np.random.default_rng(1).permutation(1000)
    assert read[order].dtype == np.int64
    assert np.array_equal(read[order], blocks[order])
    assert np.array_equal(read[np.array([299, 300, 999, 0])], blocks[[299, 300, 999, 0]])


def test_shards_do_not_depend_on_the_pieces_they_are_written_in(
    tmp_path: Path,
    blocks: Ids,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300 * 16)
    manifests = [Manifest.read(store_of(tmp_path / str(n), blocks, n) / "manifest.json") for n in (1, 7, 1000)]
    assert manifests[0] == manifests[1] == manifests[2]


def test_datasets_opens_a_shard_as_it_is(tmp_path: Path, blocks: Ids) -> None:
    datasets = pytest.importorskip("datasets")
    store = store_of(tmp_path, blocks)
    dataset = datasets.Dataset.from_file(str(store / "train" / "00000.arrow"))
    assert len(dataset) == 1000
    assert dataset[7]["input_ids"] == blocks[7].tolist()


def test_reading_a_block_copies_only_that_block(tmp_path: Path, blocks: Ids) -> None:
    read = Blocks(store_of(tmp_path, blocks), "train")
    assert not read._mapped(0).ids.flags.owndata


def test_a_shard_keeps_no_file_open_and_outlives_its_file(tmp_path: Path, blocks: Ids) -> None:
    store = store_of(tmp_path, blocks)
    num_open = len(list(Path("/dev/fd").iterdir()))
    read = Blocks(store, "train", shuffled=True)
    assert len(list(Path("/dev/fd").iterdir())) == num_open
    (store / "train" / "00000.arrow").unlink()
    read.will_need(np.arange(7))
    assert np.array_equal(read[np.arange(1000)], blocks)


def test_a_process_maps_no_more_shards_than_it_may(
    tmp_path: Path, blocks: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of 10^12 tokens has 59,605 shards, and Linux lets a process have 65,530 mappings."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 10 * 16)
    monkeypatch.setattr("clm_dist.files.blocks._MOST_MAPPED", 3)
    store = store_of(tmp_path, blocks)

    def num_mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(store / "train"))

    read = Blocks(store, "train", shuffled=True)
    order = np.random.default_rng(1).permutation(1000)
    read.will_need(order[:50])
    assert np.array_equal(read[order], blocks[order])
    assert 0 < num_mapped() <= 3
    del read
    assert num_mapped() == 0
    (store / "train" / "00098.arrow").unlink()
    with pytest.raises(DataError, match="00098"):
        Blocks(store, "train")


@pytest.mark.parametrize("shuffled", [False, True])
def test_blocks_that_will_be_needed_may_lie_anywhere(
    shuffled: bool, tmp_path: Path, blocks: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300 * 16)
    read = Blocks(store_of(tmp_path, blocks), "train", shuffled=shuffled)
    order = np.array([999, 0, 299, 300, 0])
    read.will_need(order)
    # Only the shards that have some are parsed.
    assert ["ids" in vars(read._mapped(number)) for number in range(4)] == [True, True, False, True]
    read.will_need(np.arange(1000))
    assert np.array_equal(read[order], blocks[order])


def test_the_system_is_asked_for_the_pages_of_a_block(
    tmp_path: Path, blocks: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    madvise = shards._madvise
    assert madvise
    asked: list[tuple[int, int, int]] = []

    def record(start: ctypes.c_void_p, num_bytes: ctypes.c_size_t, advice: int) -> None:
        asked.append((start.value or 0, num_bytes.value, advice))
        assert madvise(start, num_bytes, advice) == 0

    monkeypatch.setattr(shards, "_madvise", record)
    read = Blocks(store_of(tmp_path, blocks), "train", shuffled=True)
    ((_, _, advice),) = asked
    assert advice == mmap.MADV_RANDOM
    asked.clear()
    read.will_need(np.array([0, 500, 999]))
    for row, (start, num_bytes, advice) in zip((0, 500, 999), asked, strict=True):
        block = read._mapped(0).ids[row]
        assert advice == mmap.MADV_WILLNEED
        assert start % mmap.PAGESIZE == 0
        assert block.ctypes.data - mmap.PAGESIZE < start <= block.ctypes.data
        assert start + num_bytes == block.ctypes.data + block.nbytes


def bytes_from_disks() -> int:
    """Bytes that this process made the system read from disks."""
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes:"))
    return int(line.split()[1])


def test_opening_a_store_reads_nothing_of_its_blocks(tmp_path: Path) -> None:
    store = store_of(tmp_path, np.zeros((2**17, 16), np.uint16))
    with (store / "train" / "00000.arrow").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = bytes_from_disks()
    read = Blocks(store, "train", shuffled=True)
    assert bytes_from_disks() - before <= 2**16
    assert not read[np.arange(0, 2**17, 2**10)].any()
    if bytes_from_disks() == before:
        pytest.skip("the files of tests lie in memory")
    assert bytes_from_disks() - before >= 2**18


def test_ids_take_two_bytes_where_they_fit() -> None:
    assert [token_dtype(size).itemsize for size in (50257, 65536, 65537)] == [2, 2, 4]


def test_broken_stores_say_what_to_do(tmp_path: Path, blocks: Ids) -> None:
    store = store_of(tmp_path, blocks)
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(
        DataError, match=r"has format 99 of a newer version of clm-dist, this one reads 2; .* remove .* again"
    ):
        Blocks(store, "train")
    (store / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is no manifest"):
        Blocks(store, "train")
    (store / "manifest.json").write_text(json.dumps(manifest))
    shard = store / "train" / "00000.arrow"
    size = shard.stat().st_size
    shard.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"cannot read the shard .*: it has 8 bytes, and its blocks have 32,000"):
        Blocks(store, "train")
    shard.write_bytes(b"nonsense".ljust(size))
    with pytest.raises(DataError, match=r"cannot read the shard .*; remove its store to prepare again"):
        Blocks(store, "train")[np.arange(3)]
    (store / "train" / "00000.arrow").unlink()
    with pytest.raises(DataError, match="cannot read the shard"):
        Blocks(store, "train")

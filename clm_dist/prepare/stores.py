"""The stores that lie in a directory: whether they are as their manifests say, and which are old or large."""

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from clm_dist.errors import DataError
from clm_dist.files.blocks import Blocks, Manifest, file_sha256
from clm_dist.files.stores import store_lock
from clm_dist.prepare.encoded import PART_NAME

_DAY_S = 24 * 3600


@dataclass(frozen=True)
class StoredBlocks:
    """A store as it lies in its directory."""

    path: Path
    num_bytes: int
    age_days: float
    """Since a job last asked for it."""
    origin: str
    num_blocks: int
    """0 where its preparation was not finished."""


def verify_store(store: Path) -> Iterator[str]:
    """What is wrong with a store, a line each; nothing where every hash and count is as the manifest says.

    Raises:
        DataError: there is no manifest, or one of another format version.
    """
    path = store / "manifest.json"
    if not path.is_file():
        raise DataError(f"{store} is no store: it has no manifest.json; `clm-dist prepare JOB` prints a job's store")
    manifest = Manifest.read(path)
    if not manifest.is_as_written(path):
        yield f"{path} was changed since it was written"
    damaged = set()
    for name, sha256 in manifest.sha256_of_files().items():
        file = store / name
        problem = "is missing" if not file.is_file() else None
        if problem is None and (found := file_sha256(file)) != sha256:
            problem = f"has sha256 {found[:16]}..., its manifest says {sha256[:16]}..."
        if problem:
            damaged.add(name)
            yield f"{file} {problem}"
    for name, split in manifest.splits.items():
        counted = sum(shard.num_blocks for shard in split.shards)
        if counted != split.num_blocks:
            yield f"the shards of {name} have {counted:,} blocks, the split {split.num_blocks:,}"
        if split.num_tokens != split.num_blocks * manifest.block_size + split.num_dropped_tokens:
            yield f"{name} has {split.num_tokens:,} tokens, which its blocks and what was dropped do not add up to"
        if damaged.isdisjoint(shard.file for shard in split.shards):
            try:
                Blocks(store, name)
            except DataError as error:
                yield str(error)


def list_stores(stores: Path) -> list[StoredBlocks]:
    """The stores of a directory, the one that was asked for last first; unfinished ones too, and nothing else."""
    found = []
    for path in stores.iterdir() if stores.is_dir() else ():
        if not re.fullmatch("[0-9a-f]{16}", path.name):
            continue
        try:
            manifest = Manifest.read(path / "manifest.json")
            origin, num_blocks = manifest.origin, sum(split.num_blocks for split in manifest.splits.values())
        except FileNotFoundError:
            if not any((path / "work").glob(f"*{PART_NAME}")):
                continue
            origin, num_blocks = "unfinished", 0
        except (DataError, OSError):
            # Of another version, which knows what it is.
            continue
        num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        age_days = (time.time() - path.stat().st_mtime) / _DAY_S
        found.append(StoredBlocks(path, num_bytes, age_days, origin, num_blocks))
    return sorted(found, key=lambda store: store.age_days)


def remove_store(store: Path) -> bool:
    """Remove a store; false where a preparation is working on it."""
    try:
        with store_lock(store).acquire(timeout=0):
            # Without its manifest it is no store, whatever a kill leaves of the rest.
            (store / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(store)
    except Timeout:
        return False
    return True

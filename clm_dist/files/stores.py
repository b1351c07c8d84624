"""Where prepared blocks are kept: a directory of this machine, or a URL from which each machine fetches them once.

A store holds the blocks of one job, under the fingerprint of all that they are made from. The shards and the manifest
in it are those of `blocks`; a store whose manifest is there is whole.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec

from clm_dist.config.paths import local_dir, local_path
from clm_dist.errors import DataError
from clm_dist.files.atomic import make_dir, whole_file, writing
from clm_dist.files.blocks import Blocks, Manifest
from clm_dist.files.hashes import HashMemory, changed_files, file_sha256
from clm_dist.files.lease import HeldError, Lease
from clm_dist.files.storage import reaching

PARTIAL_SUFFIX = ".part.arrow"
"""Suffix of the files with encoded partitions in a store's `work`, while it is prepared."""
_MANIFEST = "manifest.json"
_DAY_S = 24 * 3600


DEFAULT_STORES = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/clm_dist"


@dataclass(frozen=True)
class Store:
    """The blocks of one job."""

    local: Path
    """Directory on this machine; its name is the fingerprint."""
    url: str | None = None
    """Where it is kept, if not in a directory that every node sees."""

    @property
    def fingerprint(self) -> str:
        return self.local.name

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine, and whole."""
        return self._manifest_file.exists()

    @property
    def _manifest_file(self) -> Path:
        return self.local / _MANIFEST

    def manifest(self) -> Manifest:
        """Raises DataError where the manifest is of another format or does not parse."""
        return Manifest.read(self._manifest_file)

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest, with which the store is whole."""
        manifest.write(self._manifest_file)

    def lease(self) -> Lease:
        """The right to write the store's directory."""
        return Lease(self.local)

    def fetch(self) -> bool:
        """Bring the store to this machine, once; return whether it is here then.

        Raises:
            ConfigError, StorageError: the URL cannot be reached.
            DataError: a file is not as the manifest says.
        """
        if self.url is None or self.is_here:
            # The manifest is written last; and the directory may be read-only here.
            return self.is_here
        make_dir(self.local.parent)
        with self.lease().hold(timeout_s=None):
            return self.fetch_held()

    def fetch_held(self) -> bool:
        """`fetch` for a process that holds the lease already."""
        if self.is_here or self.url is None:
            return self.is_here
        with reaching(f"--store {self.url}"):
            filesystem, root = fsspec.url_to_fs(self.url)
            filesystem.invalidate_cache()
            if not filesystem.exists(f"{root}/{_MANIFEST}"):
                return False
            with writing(self.local):
                make_dir(self.local)
                # The manifest last: a store that has one is whole.
                with whole_file(self._manifest_file) as manifest:
                    filesystem.get_file(f"{root}/{_MANIFEST}", str(manifest))
                    for name, sha256 in Manifest.read(manifest).sha256_of_files().items():
                        self._fetch_file(filesystem, f"{root}/{name}", self.local / name, sha256)
        return True

    def _fetch_file(self, filesystem: fsspec.AbstractFileSystem, source: str, target: Path, sha256: str) -> None:
        if target.exists() and file_sha256(target) == sha256:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as part:
            filesystem.get_file(source, str(part))
            if file_sha256(part) != sha256:
                raise DataError(
                    f"{source} is not as its manifest says; remove {self.url}/{_MANIFEST} to prepare it again, or copy "
                    "the file there once more"
                )

    def upload(self) -> None:
        """Copy the store to its URL, if it has one and is not there.

        Raises:
            ConfigError, StorageError: the URL cannot be written.
        """
        if self.url is None:
            return
        with reaching(f"--store {self.url}"):
            filesystem, root = fsspec.url_to_fs(self.url)
            filesystem.invalidate_cache()
            if filesystem.exists(f"{root}/{_MANIFEST}"):
                return
            for name in [*self.manifest().sha256_of_files(), _MANIFEST]:
                filesystem.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                filesystem.put_file(str(self.local / name), f"{root}/{name}")

    def problems(self, known: HashMemory | None = None) -> dict[str, str]:
        """The problem of each file that is not as the manifest says, by its name in the store.

        Args:
            known: files that are as it remembers them are not read, and those that are right are remembered.
        """
        return changed_files(self.local, self.manifest().sha256_of_files(), known)

    def remember(self, known: HashMemory) -> None:
        """Remember the files of a store that was written just now."""
        known.remember({self.local / name: sha256 for name, sha256 in self.manifest().sha256_of_files().items()})

    def verify(self) -> Iterator[str]:
        """The problems of the store, a line each; none if every hash and count is as the manifest says.

        Raises:
            DataError: there is no manifest, or one of another format version.
        """
        if not self.is_here:
            raise DataError(
                f"{self.local} is not a store: it has no {_MANIFEST}; `clm-dist prepare JOB` prints its store"
            )
        manifest = self.manifest()
        if not Manifest.is_as_written(self._manifest_file):
            yield f"{self._manifest_file} was changed since it was written"
        problems = self.problems()
        yield from (f"{self.local / name} {problem}" for name, problem in problems.items())
        for name, split in manifest.splits.items():
            counted = sum(shard.num_blocks for shard in split.shards)
            if counted != split.num_blocks:
                yield f"the shards of {name} have {counted:,} blocks, the split {split.num_blocks:,}"
            if split.num_tokens != split.num_blocks * manifest.block_size + split.num_dropped_tokens:
                yield f"{name} has {split.num_tokens:,} tokens, which its blocks and what was dropped do not add up to"
            if problems.keys().isdisjoint(shard.file for shard in split.shards):
                try:
                    Blocks(self.local, name).check()
                except DataError as error:
                    yield str(error)

    def remove(self) -> bool:
        """Remove the store from this machine; false where a preparation is working on it."""
        try:
            with self.lease().hold(timeout_s=0):
                # Without its manifest it is not a store, whatever a kill leaves of the rest.
                self._manifest_file.unlink(missing_ok=True)
                shutil.rmtree(self.local)
        except HeldError:
            return False
        return True


@dataclass(frozen=True)
class StoredBlocks:
    """A store as it lies in its directory."""

    store: Store
    num_bytes: int
    age_days: float
    """Since a job last asked for it."""
    origin: str
    num_blocks: int
    """0 where its preparation was not finished."""


@dataclass(frozen=True)
class Stores:
    """All stores of a directory or a URL."""

    local: Path
    """Directory on this machine; under the cache where the stores are kept at a URL."""
    url: str | None = None

    @classmethod
    def at(cls, path: str, cache: str) -> "Stores":
        """The stores at a directory or a URL that a person named.

        Args:
            cache: directory under which copies of what is kept at a URL lie.
        """
        if "://" not in path or path.startswith("file://"):
            return cls(local_dir(path, "--store"))
        url = path.rstrip("/")
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        return cls(local_path(cache, "the cache").absolute() / "remote" / name, url)

    def __str__(self) -> str:
        return self.url or str(self.local)

    def store(self, fingerprint: str) -> Store:
        """The store of a fingerprint, whether it was prepared or not."""
        return Store(self.local / fingerprint, self.url and f"{self.url}/{fingerprint}")

    def known_files(self) -> HashMemory:
        """The memory of the stores' own files."""
        return HashMemory(self.local / "files.json")

    def known_sources(self) -> HashMemory:
        """The memory of the files that stores were made from."""
        return HashMemory(self.local / "digests.json")

    def stored(self) -> list[StoredBlocks]:
        """The stores on this machine, the one that was asked for last first; unfinished ones too, and nothing else."""
        found = []
        for path in self.local.iterdir() if self.local.is_dir() else ():
            if not re.fullmatch("[0-9a-f]{16}", path.name):
                continue
            store = self.store(path.name)
            try:
                manifest = store.manifest()
                origin, num_blocks = manifest.origin, sum(split.num_blocks for split in manifest.splits.values())
            except FileNotFoundError:
                if not any((path / "work").glob(f"*{PARTIAL_SUFFIX}")):
                    continue
                origin, num_blocks = "unfinished", 0
            except (DataError, OSError):
                # Of another version, which knows what it is.
                continue
            num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            age_days = (time.time() - path.stat().st_mtime) / _DAY_S
            found.append(StoredBlocks(store, num_bytes, age_days, origin, num_blocks))
        return sorted(found, key=lambda stored: stored.age_days)

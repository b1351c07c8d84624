"""Stores on s3://, gs:// and the like: each machine fetches a store's files once, checks them and maps its own copy."""

import hashlib
from pathlib import Path

import fsspec
from filelock import FileLock

from clm_dist.config.paths import local_dir, local_path
from clm_dist.errors import DataError
from clm_dist.files.atomic import make_dir, whole_file, writing
from clm_dist.files.blocks import Manifest, file_sha256
from clm_dist.files.storage import reaching

_MANIFEST = "manifest.json"


def open_stores(path: str, cache: str) -> tuple[Path, str | None]:
    """The directory of the stores on this machine, and the URL that they are kept at if `path` is one.

    Args:
        cache: directory under which copies of what is kept at a URL lie.
    """
    if "://" not in path or path.startswith("file://"):
        return local_dir(path, "--store"), None
    url = path.rstrip("/")
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return local_path(cache, "the cache").absolute() / "remote" / name, url


def store_lock(store: Path) -> FileLock:
    """Holds a store against other processes; the system lets go of it when the process ends, however it ends."""
    return FileLock(store.parent / f".{store.name}.lock")


def fetch_store(url: str, store: Path) -> bool:
    """Bring the store at a URL to this machine, once; false where there is none.

    Raises:
        ConfigError: the URL cannot be reached.
        DataError: a file is not as the manifest says.
    """
    make_dir(store.parent)
    with store_lock(store):
        return copy_store_here(url, store)


def copy_store_here(url: str, store: Path) -> bool:
    """`fetch_store` for who holds the store's lock already."""
    if (store / _MANIFEST).exists():
        return True
    with reaching(f"--store {url}"):
        filesystem, root = fsspec.url_to_fs(url)
        filesystem.invalidate_cache()
        if not filesystem.exists(f"{root}/{_MANIFEST}"):
            return False
        with writing(store):
            make_dir(store)
            # The manifest last: a store that has one is whole.
            with whole_file(store / _MANIFEST) as manifest:
                filesystem.get_file(f"{root}/{_MANIFEST}", str(manifest))
                for name, sha256 in Manifest.read(manifest).sha256_of_files().items():
                    _fetch(filesystem, f"{root}/{name}", store / name, sha256, url)
    return True


def _fetch(filesystem: fsspec.AbstractFileSystem, source: str, target: Path, sha256: str, url: str) -> None:
    if target.exists() and file_sha256(target) == sha256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as part:
        filesystem.get_file(source, str(part))
        if file_sha256(part) != sha256:
            raise DataError(
                f"{source} is not as its manifest says; remove {url}/{_MANIFEST} to prepare it again, or copy the file "
                "there once more"
            )


def upload_store(store: Path, url: str) -> None:
    """Copy a store to a URL, unless it is there. Raises ConfigError where the URL cannot be written."""
    with reaching(f"--store {url}"):
        filesystem, root = fsspec.url_to_fs(url)
        filesystem.invalidate_cache()
        if filesystem.exists(f"{root}/{_MANIFEST}"):
            return
        for name in [*Manifest.read(store / _MANIFEST).sha256_of_files(), _MANIFEST]:
            filesystem.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(store / name), f"{root}/{name}")

"""The identity of a job's records, for its fingerprint."""

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from clm_dist.config.data import DataConfig
from clm_dist.errors import REFUSED, DataError, StorageError
from clm_dist.files.hashes import HashMemory
from clm_dist.files.storage import reaching
from clm_dist.prepare.builtin import builtin_identity
from clm_dist.prepare.data_file import is_url
from clm_dist.prepare.files import find_files
from clm_dist.prepare.plugin import plugin_identity

_PIECE_BYTES = 1 << 22


def pinned(data: DataConfig) -> DataConfig:
    """The data with the commit that its Hub data set has now; where the Hub is out of reach, had when it was read last.

    A data set that has no such commit stays as it is, and loading it says what is wrong.
    """
    if data.source != "hub" or is_directory(data):
        return data
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionResolutionError

    assert data.dataset
    try:
        resolved = HfApi().resolve_revision(data.dataset, repo_type="dataset", revision=data.revision)
    except (HfHubHTTPError, HFValidationError, RevisionResolutionError, OSError):
        return data
    return data.model_copy(update={"revision": resolved.resolved})


def source_identity(data: DataConfig, known: HashMemory) -> dict[str, Any]:
    """The identity of the records of data that is `pinned`, for a store's fingerprint.

    A local file is what it holds: one that was copied, moved or touched stays the same. A file behind a URL is what its
    server says of it (entity tag, size, time).

    Args:
        known: local files that are as it remembers them are not read.
    """
    if data.source == "builtin":
        return {**builtin_identity(data), "split": data.split}
    if data.source == "plugin":
        return plugin_identity(data) | {"split": data.split}
    if data.source == "files":
        files = find_files(data).files
        local = _digests_of([Path(file.name) for file in files if not is_url(file.name)], known)
        # The suffix says how a file is read.
        tags = [
            ["".join(file.suffixes), _tag_of(file.name) if is_url(file.name) else local[file.name]] for file in files
        ]
        # A field that is not set leaves the stores of before as they are.
        ways = {"records": data.records, "encoding": data.codec, "delimiter": data.delimiter, "field": data.field}
        return {"files": tags, "split": data.split} | {name: way for name, way in ways.items() if way is not None}
    identity: dict[str, Any] = {"config": data.config, "split": data.split}
    if is_directory(data):
        directory = Path(str(data.dataset))
        # `datasets` skips hidden files, and sees from a file's name to which split it belongs.
        names = [file.relative_to(directory) for file in sorted(directory.rglob("*")) if file.is_file()]
        names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        paths = [(directory / name).absolute() for name in names]
        found = _digests_of(paths, known, "data.dataset")
        content = [[str(name), found[str(path)]] for name, path in zip(names, paths, strict=True)]
        return identity | {"directory": content}
    return identity | {"dataset": data.dataset, "revision": data.revision}


def is_directory(data: DataConfig) -> bool:
    # Path.is_dir raises for a name that is too long.
    return os.path.isdir(data.dataset or "")  # noqa: PTH112


def _tag_of(url: str) -> str:
    """A text from the server's description of a file that changes when the file does."""
    with reaching(f"data.path {url}", field="data.path"):
        filesystem, path = fsspec.url_to_fs(url)
        described = filesystem.info(path)
    tags = [str(described.get(key)) for key in ("ETag", "etag", "md5Hash", "crc32c") if described.get(key)]
    return " ".join([*tags, str(described.get("size"))]) if tags else str(filesystem.ukey(path))


def _digests_of(files: list[Path], known: HashMemory, field: str = "data.path") -> dict[str, str]:
    """The digest of each file, by its absolute path."""
    found = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for file in files:
            try:
                found[file] = known.get(file) or _digest(file, threads)
            except OSError as error:
                kind = DataError if error.errno in (errno.ENOENT, *REFUSED) else StorageError
                raise kind(
                    f"{file}: cannot be read: {error.strerror}; give it to the user who runs this, or take it out of "
                    f"{field}",
                    field=field,
                ) from None
    known.remember(found)
    return {str(file): digest for file, digest in found.items()}


def _digest(file: Path, threads: ThreadPoolExecutor) -> str:
    """The sha256 of the sha256 of a file's pieces, which all cores work on."""

    def of_piece(start: int) -> bytes:
        with file.open("rb") as opened:
            opened.seek(start)
            return hashlib.sha256(opened.read(_PIECE_BYTES)).digest()

    digests = threads.map(of_piece, range(0, max(1, file.stat().st_size), _PIECE_BYTES))
    return hashlib.sha256(b"".join(digests)).hexdigest()

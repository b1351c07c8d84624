"""The files that `data.path` names, local or remote, and what goes wrong while they are read."""

import contextlib
import errno
import gzip
import lzma
import zlib
from dataclasses import dataclass
from glob import iglob
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from clm_dist.config.data import DataConfig
from clm_dist.errors import REFUSED, ClmDistError, ConfigError, DataError, StorageError, first_line
from clm_dist.files.lfs import is_lfs_pointer
from clm_dist.files.storage import describe_storage_error, reaching
from clm_dist.prepare.directory import choose
from clm_dist.prepare.json_lines import first_line_not_utf8, not_utf8

Kind = Literal["json", "csv", "parquet", "arrow", "text"]

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_FORMATS: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class DataFile:
    """One file, by its path or URL."""

    name: str
    size: int
    """Bytes as it lies there, compressed or not."""

    @property
    def suffixes(self) -> list[str]:
        return [suffix.lower() for suffix in Path(self.name.partition("?")[0]).suffixes]

    @property
    def compression(self) -> str | None:
        return _COMPRESSIONS.get(self.suffixes[-1]) if self.suffixes else None

    @property
    def kind(self) -> Kind | None:
        suffixes = [suffix for suffix in self.suffixes if suffix not in _COMPRESSIONS]
        return _FORMATS.get(suffixes[-1]) if suffixes else None

    @property
    def is_web(self) -> bool:
        return self.name.startswith(("http://", "https://"))

    def open(self) -> pa.NativeFile:
        """The file, which can seek; but web servers give most files from the beginning only."""
        if not is_url(self.name):
            return pa.OSFile(self.name)
        options = {"block_size": 0} if self.is_web and self.kind != "parquet" else {}
        return pa.PythonFile(fsspec.open(self.name, **options).open(), "r")

    def stream(self) -> pa.NativeFile:
        """The content of the file, from its beginning, decompressed."""
        return self.decompressed(self.open())

    def decompressed(self, opened: pa.NativeFile) -> pa.NativeFile:
        """The content of the opened file."""
        if self.compression == "gzip":
            # Arrow takes the zeros that tapes and some tools pad with for damage.
            return pa.PythonFile(gzip.GzipFile(fileobj=opened), "r")
        if self.compression == "xz":
            return pa.PythonFile(lzma.LZMAFile(opened), "r")
        return pa.CompressedInputStream(opened, self.compression) if self.compression else opened


def is_url(path: str) -> bool:
    return "://" in path


@dataclass(frozen=True)
class Found:
    """The files that `data.path` names."""

    files: list[DataFile]
    left_out: list[str]
    """For each directory of which something was left out: what, in words."""


def find_files(data: DataConfig) -> Found:
    """The files of the job's split that `data.path` names, sorted by name within each of its entries.

    Raises:
        ConfigError, DataError: a path cannot be read, matches nothing, or has no such split; or a file is of an unknown
            kind, or a pointer of Git LFS.
        StorageError: a storage is away.
    """
    paths = [data.path] if isinstance(data.path, str) else data.path or []
    split = data.split.partition("[")[0]
    files: list[DataFile] = []
    left_out, splits = [], set()
    for path in paths:
        shown = path[:_SHOWN_CHARACTERS]
        if is_url(path):
            with reaching(f"data.path {shown}", field="data.path"):
                named, is_whole = _files_of_url(path)
        else:
            try:
                named, is_whole = _files_of(path)
            except (OSError, RuntimeError) as error:
                # A name that is too long, a directory that may not be read, the home of a user that is not there.
                problem = error.strerror if isinstance(error, OSError) else first_line(error)
                raise ConfigError(
                    f"data.path {shown}: {problem}; give a file, a glob or a directory", field="data.path"
                ) from None
        if is_whole:
            chosen = choose(named, split, lambda file: file.kind is not None)
            if not chosen.splits:
                others = f", only {chosen.left_out}" if chosen.left_out else ""
                raise DataError(
                    f"data.path {shown} is a directory with no file of a known kind ({', '.join(_FORMATS)}, "
                    f"and these with {', '.join(_COMPRESSIONS)}){others}",
                    field="data.path",
                )
            if chosen.left_out:
                left_out.append(f"{shown}: {chosen.left_out}")
            splits |= set(chosen.splits)
            files += chosen.files
        else:
            splits.add("train")
            if split == "train":
                files += [file for _, file in named]
            else:
                left_out.append(f"{shown}: what is named itself is of the split train")
    if not files:
        have = "one split, train" if splits == {"train"} else f"the splits {', '.join(sorted(splits))}"
        raise ConfigError(
            f"data.split {data.split}: the files have {have}; a part of one is written train[:5000] or train[10%:20%]",
            field="data.split",
        )
    for file in files:
        if file.kind is None:
            raise DataError(f"{file.name}: unknown kind of file; known are {', '.join(_FORMATS)}", field="data.path")
        if not is_url(file.name):
            _check_no_pointer(file)
    return Found(files, left_out)


Named = list[tuple[str, DataFile]]
"""Files, with their paths inside the directory that was named."""


def _files_of(path: str) -> tuple[Named, bool]:
    """The files of a path, and whether they are a whole directory."""
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        found = [file for file in sorted(expanded.rglob("*")) if file.is_file()]
        return [(file.relative_to(expanded).as_posix(), _local_file(file)) for file in found], True
    if expanded.is_file():
        return [(expanded.name, _local_file(expanded))], False
    # Path.glob takes no absolute pattern.
    matches = map(Path, iglob(str(expanded), recursive=True))  # noqa: PTH207
    found = [match for match in sorted(matches) if match.is_file()]
    if not found:
        raise DataError(
            f"data.path {path} matches no file (looked from {Path.cwd()}); give a file, a glob or a directory",
            field="data.path",
        )
    return [(file.name, _local_file(file)) for file in found], False


def _check_no_pointer(file: DataFile) -> None:
    with contextlib.suppress(OSError):  # who reads it says so
        if is_lfs_pointer(Path(file.name)):
            raise DataError(
                f"{file.name} is a pointer of Git LFS, not the data; run `git lfs pull` in its repository",
                field="data.path",
            )


def _local_file(path: Path) -> DataFile:
    return DataFile(str(path.absolute()), path.stat().st_size)


def _files_of_url(url: str) -> tuple[Named, bool]:
    filesystem, path = fsspec.url_to_fs(url)
    # What it listed before may have changed since.
    filesystem.invalidate_cache()

    def described(names: list[str], root: str = "") -> Named:
        return [
            (
                name.removeprefix(root).lstrip("/"),
                DataFile(filesystem.unstrip_protocol(name), filesystem.info(name)["size"] or 0),
            )
            for name in names
        ]

    if any(character in path for character in "*?[") and not url.startswith("http"):
        found = described(sorted(name for name in filesystem.glob(path) if filesystem.isfile(name)))
    elif url.startswith("http") or filesystem.isfile(path):
        found = [(url, DataFile(url, filesystem.info(path)["size"] or 0))]
    elif filesystem.isdir(path):
        return described(sorted(filesystem.find(path)), path), True
    else:
        found = []
    if not found:
        raise DataError(f"data.path {url} matches no file; check the bucket and the name", field="data.path")
    return found, False


class reading:  # noqa: N801  # a context manager reads as a verb
    """Turns what goes wrong while a file is read into an error that names the file."""

    def __init__(self, file: DataFile) -> None:
        self.file = file

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UnicodeDecodeError) or (isinstance(error, pa.ArrowException) and "UTF8" in str(error)):
            number = None
            if self.file.kind in ("csv", "text"):
                with self.file.stream() as stream:
                    number = first_line_not_utf8(stream)
            raise not_utf8(f"{self.file.name}:{number}" if number else self.file.name) from None
        if not isinstance(error, Exception) or isinstance(error, ClmDistError):
            return
        problem = f"{self.file.name}: cannot be read"
        mend = "mend the file or take it out of data.path"
        # Where compressed bytes are damaged or missing, Arrow raises an OSError without a number.
        is_short = isinstance(error, _DAMAGE) or (type(error) is OSError and error.errno is None)
        of_format = is_short or isinstance(error, pa.ArrowException)
        if is_url(self.file.name) and is_short:
            # The connection may have ended early, so what is done so far is kept.
            problem = f"{problem}: {first_line(error)}; run the same command again, or {mend}"
            raise StorageError(problem, field="data.path") from None
        if is_url(self.file.name) and not of_format:
            raise describe_storage_error(error, problem, field="data.path") from None
        if of_format or (isinstance(error, OSError) and error.errno in (errno.ENOENT, *REFUSED)):
            raise DataError(f"{problem}: {first_line(error)}; {mend}", field="data.path") from None
        if isinstance(error, OSError):
            problem = f"{problem}: {first_line(error)}; {mend}, or run the same command again"
            raise StorageError(problem, field="data.path") from None

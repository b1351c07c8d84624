"""The files that `data.path` names, local or remote."""

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from glob import iglob
from pathlib import Path

import fsspec

from clm_dist.config.data import DataConfig
from clm_dist.errors import ConfigError, DataError, first_line
from clm_dist.files.lfs import is_lfs_pointer
from clm_dist.files.storage import reaching
from clm_dist.prepare.data_file import COMPRESSIONS, FORMATS, DataFile, Kind, is_url
from clm_dist.prepare.directory import choose

_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Found:
    """The files that `data.path` names."""

    files: list[DataFile]
    left_out: list[str]
    """For each directory of which something was left out: what, in words."""


def find_files(data: DataConfig) -> Found:
    """The files of the job's split that `data.path` names, sorted by name within each of its entries.

    What is left out does not have the files that are read as the eval split.

    Raises:
        ConfigError, DataError: a path cannot be read, matches nothing, or has no such split; or a file is of an unknown
            kind, or a pointer of Git LFS.
        StorageError: a storage is away.
    """
    paths = [data.path] if isinstance(data.path, str) else data.path or []
    split = data.split.partition("[")[0]
    elsewhere = data.eval_split.partition("[")[0] if data.eval_split and data.eval_path is None else None
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
            chosen = choose(named, split, lambda file: file.kind in _kinds_of_directory(data), elsewhere)
            if not chosen.splits:
                raise _nothing_known(shown, chosen.left_out, data)
            if chosen.left_out:
                left_out.append(f"{shown}: {chosen.left_out}")
            splits |= set(chosen.splits)
            files += chosen.files
        else:
            splits.add("train")
            if split == "train":
                files += [file for _, file in named]
            elif elsewhere != "train":
                left_out.append(f"{shown}: what is named itself is of the split train")
    if not files:
        have = "one split, train" if splits == {"train"} else f"the splits {', '.join(sorted(splits))}"
        raise ConfigError(
            f"data.split {data.split}: the files have {have}; a part of one is written train[:5000] or train[10%:20%]",
            field="data.split",
        )
    files = [replace(file, is_text=data.records is not None, encoding=data.codec) for file in files]
    for file in files:
        _check_kind(file, data)
        if not is_url(file.name):
            _check_no_pointer(file)
    return Found(files, left_out)


def _kinds_of_directory(data: DataConfig) -> Collection[Kind]:
    """The kinds of file that are read of a directory, where no person named each file."""
    return {"text"} if data.records else set(FORMATS.values())


def _nothing_known(shown: str, left_out: str, data: DataConfig) -> DataError:
    kinds = ", ".join(suffix for suffix, kind in FORMATS.items() if kind in _kinds_of_directory(data))
    only = f", only {left_out}" if left_out else ""
    glob = f"{shown.rstrip('/')}/**/*.py"
    advice = f"; name other files of text by a glob, such as {glob}"
    if not data.records:
        advice = f"; if that is text, name it by a glob, such as {glob}, and set data.records to file" if only else ""
    return DataError(
        f"data.path {shown} is a directory with no file of a known kind ({kinds}, and these with "
        f"{', '.join(COMPRESSIONS)}){only}{advice}",
        field="data.path",
    )


def _check_kind(file: DataFile, data: DataConfig) -> None:
    """Raise an error for a file that cannot be read as the job says."""
    if file.kind is None:
        raise DataError(
            f"{file.name}: unknown kind of file; known are {', '.join(FORMATS)}; if it is text, set data.records to "
            "file, paragraph or line",
            field="data.path",
        )
    is_text = file.kind_by_suffix not in ("parquet", "arrow")
    of_options = {
        "records": ("text", is_text),
        "encoding": ("text", is_text),
        "delimiter": ("CSV", file.kind == "csv"),
        "field": (".json files that are one object", file.kind == "json" and ".json" in file.suffixes),
    }
    for name, (what, applies) in of_options.items():
        value = getattr(data, name)
        if value is not None and not applies:
            raise ConfigError(
                f"data.{name} {value!r} is for {what}, and {file.name} is not; set data.{name} to null, or take the "
                "file out of data.path",
                field=f"data.{name}",
            )


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

"""How files are written: a file is whole or it is not there."""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clm_dist.errors import ClmDistError, ConfigError, describe_os_error, first_line

UNFINISHED_SUFFIX = ".part"
"""Suffix of files that are not whole yet; their names begin with a dot."""
_FULL_BYTES = 2**20
"""A disk with less is full: a write that failed took what was left, and may have given some of it back."""


def make_dir(path: Path, *, private: bool = False) -> Path:
    """Create a directory. Raises ConfigError where that is not allowed, StorageError where the disk is full.

    Args:
        private: nobody else may look into it, also if it is there with other permissions.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if private:
            path.chmod(0o700)
        # A directory may exist and still refuse files.
        probe = path / f".write-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into an error that says so."""
    try:
        yield
    except ClmDistError:
        raise
    except Exception as error:  # libraries have errors of their own for what the disk says
        described = describe_os_error(system_error(error, path), path)
        if described is None:
            raise
        raise described from error


def system_error(error: BaseException, path: Path) -> BaseException:
    """The error of the system behind what a library raised while it wrote to `path`; else the error itself."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    # Libraries in Rust and shutil.copytree have the number in their text alone.
    if found := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error)):
        number = int(found[1] or found[2])
        return OSError(number, os.strerror(number))
    # torch, numpy and Arrow do not have it at all where the disk is full; datasets asks before it writes.
    is_full = isinstance(error, (OSError, RuntimeError)) and _is_full(path)
    if is_full or str(error).startswith("Not enough disk space"):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return error


def _is_full(path: Path) -> bool:
    existing = next(p for p in (path, *path.parents) if p.exists())
    return shutil.disk_usage(existing).free < _FULL_BYTES


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes the file at `path` once it is whole; of what fails nothing is left."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED_SUFFIX}")
    try:
        # Whether the disk is full is seen before what fills it is removed.
        with writing(path):
            yield unfinished
            unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):  # what hinders it is said already
            unfinished.unlink(missing_ok=True)


def remove_unfinished(directory: Path) -> None:
    """Remove what a process that was killed left of files that were not whole yet."""
    for unfinished in directory.rglob(f".*{UNFINISHED_SUFFIX}"):
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a file whole: a reader sees the old content or the new, also after a crash.

    Args:
        private: nobody else may read it, also if it is there with other permissions; else the umask decides.
    """
    with whole_file(path) as unfinished:
        unfinished.touch(0o600 if private else 0o666)
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", private=private)


def read_json(path: Path) -> Any:
    """The object in a file that clm-dist wrote. Raises ConfigError where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, first_line(error)) from None
    if not isinstance(value, dict):
        raise damaged(path, "it is not a JSON object")
    return value


def damaged(path: Path, reason: str) -> ConfigError:
    """The error that a person understands for a file that is not as clm-dist wrote it."""
    return ConfigError(f"{path} is damaged: {reason}; remove it, and the command that wrote it writes it again")


def replace_dir(source: Path, target: Path) -> None:
    """Put a complete directory in place of another, on the same disk."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)

"""Every path that a run writes, and how it is written: a file is whole or it is not there."""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clm_dist.errors import ConfigError, describe_os_error, first_line

PART_SUFFIX = ".part"
"""Of files that are not whole yet; their names begin with a dot."""
_FULL_BYTES = 2**20
"""A disk with less is full: a write that failed took what was left, and may have given some of it back."""


@dataclass(frozen=True)
class RunDir:
    """The directory of one run."""

    root: Path

    @property
    def job(self) -> Path:
        """The resolved job; workers read this copy and nothing else."""
        return self.root / "job.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, in the order of the steps."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie unless the job says otherwise."""
        return self.root / "checkpoints"

    @property
    def ray(self) -> Path:
        """Ray Train's own storage of the run."""
        return self.root / "ray"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def final(self) -> Path:
        """The trained model, a plain Hugging Face directory."""
        return self.root / "final"

    @property
    def exports(self) -> Path:
        """Models of earlier epochs that wait for their push."""
        return self.root / "exports"

    @property
    def hub(self) -> Path:
        """What is pushed and what is still to push."""
        return self.root / "hub.json"

    @property
    def stop(self) -> Path:
        """Once this file is there, the workers save a checkpoint and end."""
        return self.root / "stop"

    @property
    def save(self) -> Path:
        """Once this file is there, the workers save a checkpoint, remove it and go on."""
        return self.root / "save"

    @property
    def beats(self) -> Path:
        """What each worker does, while workers run."""
        return self.root / "beats"

    @property
    def hang(self) -> Path:
        """Why the driver ends workers that hang, until that is recorded."""
        return self.root / "hang.txt"

    @property
    def uncommitted(self) -> Path:
        """Name of the last checkpoint that every worker wrote and that could not be committed, and why."""
        return self.root / "uncommitted.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def outlier(self, step: int) -> Path:
        """The blocks of a step whose loss or gradient stood out, with their text."""
        return self.root / "outliers" / f"step-{step:08d}.json"

    def exists(self) -> bool:
        return self.job.is_file()


def make_dir(path: Path) -> Path:
    """Create a directory. Raises ConfigError where that is not possible."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
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
    except (OSError, RuntimeError) as error:
        # torch and Arrow raise errors of their own where the disk is full.
        full = not isinstance(error, OSError) and _is_full(path)
        described = describe_os_error(OSError(errno.ENOSPC, "full") if full else error, path)
        if described is None:
            raise
        raise described from error


def _is_full(path: Path) -> bool:
    existing = next(p for p in (path, *path.parents) if p.exists())
    return shutil.disk_usage(existing).free < _FULL_BYTES


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes the file at `path` once it is whole; of what fails nothing is left."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART_SUFFIX}")
    with writing(path):
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def remove_parts(directory: Path) -> None:
    """Remove what a process that was killed left of files that were not whole yet."""
    for part in directory.rglob(f".*{PART_SUFFIX}"):
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole: a reader sees the old content or the new, also after a crash."""
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a file that clm-dist wrote. Raises ConfigError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, first_line(error)) from None


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


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that a crash cut short is left out.

    Raises:
        ConfigError: another line is no record; the message names it.
    """
    if not path.exists():
        return []
    # Every whole record ends with a newline, so what follows the last one is a fragment or nothing.
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not record.keys() >= {"kind", "step"}:
            raise ConfigError(f"{path}:{number}: not a record of a run; remove this line")
        records.append(record)
    return records

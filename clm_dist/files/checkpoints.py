"""Checkpoints of a run: where they lie, which of them count, and what they say of themselves; no torch.

    step-00000020-1f2e3d4c/rank-00000.safetensors    what each rank wrote
                           rank-00001.safetensors
                           committed.json            the marker

A checkpoint counts once its marker is there, which the driver writes when the file of every rank is; what has none is
never resumed from. The marker names each file with its size, its sha256 and the parts of parameters in it, so that any
number of workers finds what it needs. A directory's name is never used twice.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from clm_dist.config.job import JobConfig
from clm_dist.errors import CheckpointError, first_line
from clm_dist.files.atomic import make_dir, write_json, writing
from clm_dist.files.hashes import file_sha256
from clm_dist.files.markers import (
    FORMAT_VERSION,
    BestEval,
    DamagedError,
    Marker,
    RankFile,
    TrainerState,
    best_of,
    checkpoint_of,
)
from clm_dist.files.run_dir import RunDir
from clm_dist.files.storage import reaching

logger = logging.getLogger(__name__)


_MARKER = "committed.json"
_SET_ASIDE = "damaged.json"


class Checkpoints:
    """The checkpoints of one run, in a directory or at a URL of any storage that fsspec knows.

    What a storage raises beside the errors of this class is left as it is, but for `check_access` and in `reaching`.

    Raises:
        ConfigError: no storage of the URL's kind is known.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        # Another process writes here too, so nothing that was listed is remembered.
        with self.reaching():
            self._files, self._path = fsspec.url_to_fs(self.root, use_listings_cache=False)
        self._local = Path(self._path) if "file" in _protocols(self._files) else None

    @classmethod
    def of_run(cls, job: JobConfig, run: RunDir) -> "Checkpoints":
        path = job.checkpoint.path
        return cls(str(run.checkpoints.absolute()) if path is None else f"{path.rstrip('/')}/{job.name}")

    def check_access(self) -> None:
        """Raise ConfigError or StorageError where nothing can be written here."""
        if self._local:
            make_dir(self._local)
            return
        with self.reaching():
            probe = f"{self._path}/.write-{secrets.token_hex(4)}"
            self._files.makedirs(self._path, exist_ok=True)
            self._files.pipe_file(probe, b"")
            self._files.rm_file(probe)

    def reaching(self) -> contextlib.AbstractContextManager[None]:
        """Turns what the storage raises into an error that says so; see `storage.reaching`."""
        return reaching(f"checkpoint.path {self.root}", field="checkpoint.path")

    def saving(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Turns what the storage raises in a save into an error that a person understands."""
        return writing(self._local / name) if self._local else self.reaching()

    def where(self, name: str) -> str:
        """Where a checkpoint lies, for people."""
        return f"{self.root}/{name}"

    def committed(self) -> list[str]:
        """Names of the committed checkpoints, the oldest first."""
        return sorted(name for name, files in self.directories().items() if _MARKER in files)

    def is_committed(self, name: str) -> bool:
        return bool(self._files.exists(f"{self._path}/{name}/{_MARKER}"))

    def read(self, name: str) -> Marker:
        """A checkpoint's marker.

        Raises:
            DamagedError: it is not as it was written.
            CheckpointError: this version does not read it.
        """
        try:
            content = json.loads(self._files.cat_file(f"{self._path}/{name}/{_MARKER}"))
            version = content["format_version"]
            if version == FORMAT_VERSION:
                shares = tuple(
                    RankFile(**share | {"fragments": {p: (a, b) for p, (a, b) in share["fragments"].items()}})
                    for share in content["shares"]
                )
                parameters = {name: tuple(shape) for name, shape in content["state"]["parameters"].items()}
                losses = tuple(content["state"]["recent_losses"])
                best = content["state"].get("best")
                state = TrainerState(
                    **content["state"]
                    | {"recent_losses": losses, "parameters": parameters, "best": best and BestEval(**best)}
                )
                return Marker(**content | {"state": state, "shares": shares})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{self.where(name)}/{_MARKER} is damaged ({first_line(error)})") from None
        raise CheckpointError(
            f"{self.where(name)} has format {version}, this version of clm-dist reads {FORMAT_VERSION}; go on with the "
            "version that wrote it, or start again with --overwrite or another name"
        )

    @contextlib.contextmanager
    def writing(self, name: str, file: str) -> Iterator[BinaryIO]:
        """A file of a checkpoint that is not committed, to write; it is on its storage when this returns."""
        path = f"{self._path}/{name}/{file}"
        self._files.makedirs(f"{self._path}/{name}", exist_ok=True)
        with self._files.open(path, "wb") as opened:
            yield opened
        if self._local:
            for written in (self._local / name / file, self._local / name, self._local):
                _sync(written)

    @contextlib.contextmanager
    def reading(self, name: str, share: RankFile) -> Iterator[Path]:
        """A rank's file of a checkpoint on this machine. Raises DamagedError where it is not as it was written."""
        with contextlib.ExitStack() as stack:
            if self._local:
                path = self._local / name / share.file
            else:
                path = stack.enter_context(_scratch_dir()) / share.file
                with contextlib.suppress(FileNotFoundError):
                    self._files.get_file(f"{self._path}/{name}/{share.file}", str(path))
            if not path.exists() or path.stat().st_size != share.num_bytes or file_sha256(path) != share.sha256:
                problem = "is missing" if not path.exists() else "is not as it was written"
                raise DamagedError(f"{self.where(name)}/{share.file} {problem}")
            yield path

    def commit(self, name: str, marker: Marker, keep: int, *, keep_best: bool = False) -> None:
        """Mark a checkpoint as complete, then remove those that are no longer kept: what stays is the newest `keep`
        and the one with the lowest eval loss. What cannot be removed now is removed by a later commit.

        Args:
            keep_best: also keep what each of these has as its best evaluation, whose weights a run may yet need that
                goes on from there, because a newer one is damaged.
        """
        content = asdict(marker) | {"time": time.time()}
        if self._local:
            write_json(self._local / name / _MARKER, content)
        else:
            self._files.pipe_file(f"{self._path}/{name}/{_MARKER}", json.dumps(content).encode())
        try:
            markers = self.readable()
            kept = {*list(markers)[-keep:], best_of(markers)}
            if keep_best:
                bests = (markers[name].state.best for name in list(markers)[-keep:])
                kept |= {checkpoint_of(best, markers) for best in bests if best}
            for old in markers.keys() - kept:
                self.remove(old)
        except Exception as error:  # each kind of storage raises errors of its own
            logger.warning("old checkpoints in %s could not be removed", self.root, exc_info=error)

    def readable(self) -> dict[str, Marker]:
        """The committed checkpoints that this version reads, the oldest first."""
        markers = {}
        for name in self.committed():
            # One may have been removed since.
            with contextlib.suppress(CheckpointError, FileNotFoundError):
                markers[name] = self.read(name)
        return markers

    def remove(self, name: str) -> None:
        """Remove a checkpoint, whatever there is of it."""
        # Without its marker a directory that is half removed is nothing, rather than broken.
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._path}/{name}/{_MARKER}")
        if self._local:
            shutil.rmtree(self._local / name, ignore_errors=True)
        else:
            # Not as a whole: that would read brackets in the path as a pattern.
            for path in self._files.find(f"{self._path}/{name}"):
                self._files.rm_file(path)
            with contextlib.suppress(OSError):
                self._files.rmdir(f"{self._path}/{name}")

    def set_aside(self, name: str) -> None:
        """Remove the marker of a damaged checkpoint, so that it no longer counts; its files stay for inspection."""
        # Not moved, which would read brackets in the path as a pattern.
        marker = self._files.cat_file(f"{self._path}/{name}/{_MARKER}")
        self._files.pipe_file(f"{self._path}/{name}/{_SET_ASIDE}", marker)
        self._files.rm_file(f"{self._path}/{name}/{_MARKER}")

    def remove_uncommitted(self) -> None:
        """Clear what killed saves left behind. Only while no worker saves."""
        for name, files in self.directories().items():
            if not files & {_MARKER, _SET_ASIDE}:
                self.remove(name)

    def remove_all(self) -> None:
        for name in self.directories():
            self.remove(name)

    def directories(self) -> dict[str, set[str]]:
        """Directories of checkpoints, and the files in each."""
        found: dict[str, set[str]] = {}
        if not self._files.exists(self._path):
            return found
        for path in self._files.find(self._path, maxdepth=2, withdirs=True):
            inside = str(path)[len(self._path) :].strip("/").split("/")
            if inside[0].startswith("step-"):
                found.setdefault(inside[0], set()).update(inside[1:])
        return found


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


@contextlib.contextmanager
def _scratch_dir() -> Iterator[Path]:
    """A directory for files that were fetched. What killed processes left of theirs is removed."""
    prefix = "clm-dist-fetched-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if not Path(f"/proc/{left.name.removeprefix(prefix).partition('-')[0]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as directory:
        yield Path(directory)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

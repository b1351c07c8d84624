"""Saving in the background: weights and moments change in the optimizer's update only, so a thread copies them to host
memory while the next passes run, and the next update waits for the copy, not for the disk.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from clm_dist.errors import first_line
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.markers import RankFile
from clm_dist.train.checkpointing.fragments import Fragment, own_part

_WRITE_BYTES = 2**22
_WAIT_S = 0.05
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Saved:
    """How this rank's file of a save ended."""

    name: str
    step: int
    share: RankFile | None
    """None where it failed."""
    error: str | None
    seconds: float
    """From the begin of the save until the file was on its storage."""
    blocked: float
    """Seconds of it in which training waited."""


class Saver:
    """Writes this rank's file of a checkpoint in a thread. One save at a time."""

    def __init__(self, checkpoints: Checkpoints, rank: int, world_size: int) -> None:
        self._checkpoints = checkpoints
        self._rank, self._world_size = rank, world_size
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._host: dict[str, Tensor] = {}
        self._blocked = 0.0
        self._ended: Saved | None = None

    def begin(self, name: str, step: int, fragments: Iterable[Fragment]) -> None:
        """Start to save; `await_copy` must return before the fragments change."""
        began = time.perf_counter()
        slices = own_part(fragments, self._rank, self._world_size)
        self._copied.clear()
        self._ended = None
        self._thread = threading.Thread(target=self._save, args=(name, step, slices, began), daemon=True)
        self._thread.start()
        self._blocked = time.perf_counter() - began

    def await_copy(self) -> None:
        """Wait until what is to be saved may change."""
        if self._thread is not None and not self._copied.is_set():
            began = time.perf_counter()
            self._copied.wait()
            self._blocked += time.perf_counter() - began

    def is_written(self) -> bool:
        """Whether a save has ended that was not taken yet."""
        return self._thread is not None and not self._thread.is_alive()

    def take(self) -> Saved | None:
        """The save that has ended since; None while one runs, or where there was none."""
        if not self.is_written():
            return None
        self._thread = None
        assert self._ended is not None
        return Saved(**vars(self._ended) | {"blocked": self._blocked})

    def wait(self, alive: Callable[[], None] = lambda: None) -> None:
        """Let training wait for the end of the save that runs, if one does.

        Args:
            alive: called many times a second.
        """
        began = time.perf_counter()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_WAIT_S)
            alive()
        self._blocked += time.perf_counter() - began

    def _save(self, name: str, step: int, slices: list[Fragment], began: float) -> None:
        share, problem = None, None
        try:
            tensors = self._copy(slices)
            self._copied.set()
            file = f"rank-{self._rank:05d}.safetensors"
            with self._checkpoints.saving(name), self._checkpoints.writing(name, file) as opened:
                num_bytes, sha256 = write_safetensors(opened, tensors)
            share = RankFile(file, num_bytes, sha256, {one.parameter: (one.start, one.stop) for one in slices})
        except Exception as error:  # whatever a storage raises: the driver decides what becomes of the run
            problem = first_line(error)
        finally:
            self._copied.set()
        self._ended = Saved(name, step, share, problem, time.perf_counter() - began, 0.0)

    def _copy(self, slices: list[Fragment]) -> dict[str, Tensor]:
        """The slices in host memory, which is kept for the next save: to get new memory takes as long as to fill it."""
        for one in slices:
            for kind, tensor in one.tensors.items():
                key = f"{one.parameter}:{kind}"
                if key not in self._host or self._host[key].shape != tensor.shape:
                    self._host[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
                self._host[key].copy_(tensor.detach())
        return self._host


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write tensors in host memory in the format of safetensors. Return size and sha256.

    safetensors' `save_file` writes to a local path only, and its `save` holds everything twice and all other threads
    meanwhile (0.8.0).
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, num_bytes = hashlib.sha256(), 0
    for chunk in _chunks(text, tensors.values()):
        file.write(chunk)
        digest.update(chunk)
        num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()


def _chunks(header: bytes, tensors: Iterable[Tensor]) -> Iterator[Any]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        content = tensor.view(torch.uint8).numpy()
        for start in range(0, len(content), _WRITE_BYTES):
            yield content[start : start + _WRITE_BYTES].data

"""Fragments of parameters, which a rank writes to a checkpoint and reads from one of any strategy.

Every strategy keeps, for each parameter, fp32 weights and AdamW's two moments, flat and cut somewhere else. A fragment
is one rank's piece of a parameter. Saved, it says which elements it has; so a rank that holds other pieces, because the
number of workers or the strategy is another, copies the overlaps from the files that have them:

    saved by 2     wte [0 ......... 511][512 ........ 999]
    read by 3      wte [0 ... 340][341 ... 666][667 .. 999]      the second reads of both files

Saving is in the background: weights and moments change in the optimizer's update only, so a thread copies them to host
memory while the next passes run, and the next update waits for the copy, not for the disk.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from clm_dist.errors import CheckpointError
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.markers import Marker, RankFile


@dataclass(frozen=True)
class Fragment:
    """The elements [start, start + n) of a flattened parameter that this rank holds."""

    parameter: str
    start: int
    tensors: Mapping[str, Tensor]
    """`weight`, `exp_avg`, `exp_avg_sq`, each (n,): views of what the optimizer changes."""
    replicated: bool = False
    """Whether every rank holds the same; then each saves a slice of its own."""

    @property
    def stop(self) -> int:
        return self.start + next(iter(self.tensors.values())).numel()

    def own_slice(self, rank: int, world_size: int) -> "Fragment":
        """The slice of it that a rank saves."""
        if not self.replicated:
            return self
        size = self.stop - self.start
        begin, end = size * rank // world_size, size * (rank + 1) // world_size
        tensors = {kind: tensor[begin:end] for kind, tensor in self.tensors.items()}
        return Fragment(self.parameter, self.start + begin, tensors)


@contextlib.contextmanager
def fetched(
    checkpoints: Checkpoints, name: str, marker: Marker, fragments: list[Fragment]
) -> Iterator[dict[str, Path]]:
    """The files of a checkpoint that these fragments need, on this machine and checked.

    Raises:
        DamagedError: one is missing or damaged.
        CheckpointError: a fragment is in none.
    """
    with contextlib.ExitStack() as stack:
        needed = {share.file: share for fragment in fragments for share, _, _ in _overlaps(marker, fragment)}
        yield {file: stack.enter_context(checkpoints.reading(name, share)) for file, share in needed.items()}


def load_fragments(files: Mapping[str, Path], marker: Marker, fragments: list[Fragment]) -> None:
    """Copy a checkpoint's content into fragments, in place."""
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(path, "pt")) for file, path in files.items()}
        with torch.no_grad():
            for fragment in fragments:
                for share, begin, end in _overlaps(marker, fragment):
                    first = share.fragments[fragment.parameter][0]
                    for kind, tensor in fragment.tensors.items():
                        saved = opened[share.file].get_slice(f"{fragment.parameter}:{kind}")[
                            begin - first : end - first
                        ]
                        tensor[begin - fragment.start : end - fragment.start].copy_(saved)


def _overlaps(marker: Marker, fragment: Fragment) -> list[tuple[RankFile, int, int]]:
    """The files that hold a part of a fragment, and which elements of the parameter that is."""
    found = []
    reached = fragment.start
    shares = [share for share in marker.shares if fragment.parameter in share.fragments]
    for share in sorted(shares, key=lambda share: share.fragments[fragment.parameter]):
        begin, end = share.fragments[fragment.parameter]
        begin, end = max(begin, fragment.start), min(end, fragment.stop)
        if begin < end:
            if begin != reached:
                break
            found.append((share, begin, end))
            reached = end
    if reached != fragment.stop:
        raise CheckpointError(f"the elements {reached} to {fragment.stop} of {fragment.parameter} are in no file")
    return found

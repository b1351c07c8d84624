"""Fragments of parameters, which a rank writes to a checkpoint and reads from one of any strategy.

Every strategy keeps, for each parameter, fp32 weights and the optimizer's state tensors, flat and cut somewhere else. A
fragment is one rank's piece of a parameter. Saved, it says which elements it has; so a rank that holds other pieces,
because the number of workers or the strategy is another, copies the overlaps from the files that have them:

    saved by 2     wte [0 ......... 511][512 ........ 999]
    read by 3      wte [0 ... 340][341 ... 666][667 .. 999]      the second reads of both files

Saving is in the background: weights and moments change in the optimizer's update only, so a thread copies them to host
memory while the next passes run, and the next update waits for the copy, not for the disk.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
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
    """`weight`, and the optimizer's state: `exp_avg` and `exp_avg_sq` of AdamW; each (n,), views of what it changes."""
    replicated: bool = False
    """Whether every rank holds the same; then each saves a part of its own."""

    @property
    def stop(self) -> int:
        return self.start + next(iter(self.tensors.values())).numel()

    def cut(self, begin: int, end: int) -> "Fragment":
        """Its elements [begin, end), counted from its own first."""
        tensors = {kind: tensor[begin:end] for kind, tensor in self.tensors.items()}
        return Fragment(self.parameter, self.start + begin, tensors)


def own_part(fragments: Iterable[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """What a rank saves: all that it alone holds, and an equal part of what every rank holds.

    That is cut from all of it in a row, so that most parameters are whole in one file: a marker names as many pieces as
    there are parameters and ranks together, not one of each parameter for each rank.
    """
    fragments = list(fragments)
    own = [fragment for fragment in fragments if not fragment.replicated]
    shared = [fragment for fragment in fragments if fragment.replicated]
    total = sum(fragment.stop - fragment.start for fragment in shared)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    passed = 0
    for fragment in shared:
        size = fragment.stop - fragment.start
        own.append(fragment.cut(max(0, first - passed), max(0, min(size, last - passed))))
        passed += size
    return [fragment for fragment in own if fragment.start < fragment.stop]


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
        pieces = _pieces_of(marker)
        needed = {share.file: share for fragment in fragments for share, _, _ in _overlaps(pieces, fragment)}
        yield {file: stack.enter_context(checkpoints.reading(name, share)) for file, share in needed.items()}


def load_fragments(files: Mapping[str, Path], marker: Marker, fragments: list[Fragment]) -> None:
    """Copy a checkpoint's content into fragments, in place."""
    pieces = _pieces_of(marker)
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(path, "pt")) for file, path in files.items()}
        with torch.no_grad():
            for fragment in fragments:
                for share, begin, end in _overlaps(pieces, fragment):
                    first = share.fragments[fragment.parameter][0]
                    for kind, tensor in fragment.tensors.items():
                        try:
                            whole = opened[share.file].get_slice(f"{fragment.parameter}:{kind}")
                        except SafetensorError as error:
                            raise CheckpointError(
                                f"the checkpoint has no {kind} of {fragment.parameter}: it was saved with other "
                                "train.optimizer_options; resume with them, or start again with --overwrite or another "
                                "name"
                            ) from error
                        saved = whole[begin - first : end - first]
                        tensor[begin - fragment.start : end - fragment.start].copy_(saved)


_Pieces = Mapping[str, list[tuple[int, int, RankFile]]]
"""For each parameter its pieces in order: the first element, the one after the last, and the file that has them."""


def _pieces_of(marker: Marker) -> _Pieces:
    pieces = defaultdict(list)
    for share in marker.shares:
        for parameter, (begin, end) in share.fragments.items():
            pieces[parameter].append((begin, end, share))
    return {parameter: sorted(found, key=lambda piece: piece[:2]) for parameter, found in pieces.items()}


def _overlaps(pieces: _Pieces, fragment: Fragment) -> list[tuple[RankFile, int, int]]:
    """The files that hold a part of a fragment, and which elements of the parameter that is."""
    found = []
    reached = fragment.start
    for first, last, share in pieces.get(fragment.parameter, ()):
        begin, end = max(first, fragment.start), min(last, fragment.stop)
        if begin < end:
            if begin != reached:
                break
            found.append((share, begin, end))
            reached = end
    if reached != fragment.stop:
        raise CheckpointError(f"the elements {reached} to {fragment.stop} of {fragment.parameter} are in no file")
    return found

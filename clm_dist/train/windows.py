"""Windows: stretches of text that a model sees in one pass each, and the tokens in them whose prediction counts.

With a context of T tokens and a stride of S, the windows of a text of n tokens begin at 0, S, 2 S, ... until one
reaches the end. In each only the tokens that no window before has are predicted, so all but the first T of a text have
at least T - S tokens before them:

    context 4, stride 2      a b c d e f
    window 0                 a b c d          predicts b c d
    window 1                     c d e f      predicts e f

(the fixed-length perplexity of transformers' documentation, whose example counts the tokens of each later window but
one). With a stride of the context, windows are blocks, and the first token of each has nothing before it.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from clm_dist.errors import ConfigError
from clm_dist.files.blocks import Blocks

Positions = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Windows as a model takes them; shorter ones are filled up at their ends."""

    ids: npt.NDArray[np.int64]
    """(B, T)"""
    counts: npt.NDArray[np.bool_]
    """Whether the prediction of a token counts, (B, T - 1)."""
    documents: Positions
    """Which document each predicted token is of, (B, T - 1)."""


@dataclass(frozen=True)
class Windows:
    """The windows of one or more texts that lie one after the other."""

    ids: npt.NDArray[np.uint32] | Path
    """All tokens, or the store whose eval split has them."""
    begins: Positions
    """Place of the first token of each window, (num_windows,)."""
    ends: Positions
    firsts: Positions
    """Place of the first token of each whose prediction counts."""
    document_ends: Positions
    """Place after the last token of each document, (num_documents,)."""

    @classmethod
    def of_texts(cls, ids: npt.NDArray[np.uint32], offsets: Positions, *, context: int, stride: int) -> Self:
        """Windows that lie inside of documents each.

        Args:
            offsets: where each document begins, and where the last one ends, (num_documents + 1,).
        """
        begins, ends, firsts = _slide(offsets[:-1], offsets[1:], context, stride)
        # Windows of one length beside each other: what is filled up is computed for nothing.
        order = np.argsort(ends - begins, kind="stable")
        order = order[ends[order] - firsts[order] > 0]
        return cls(ids, begins[order], ends[order], firsts[order], offsets[1:])

    @classmethod
    def of_store(cls, store: Path, *, stride: int | None, document_end: int | None) -> Self:
        """Windows over a store's eval split from its first block to its last.

        Args:
            stride: None takes the blocks as they are.
            document_end: id that ends a document; None where none does, and each block counts for one.
        """
        blocks = Blocks(store, "eval")
        size = blocks.block_size
        num_tokens = len(blocks) * size
        whole = np.array([num_tokens])
        document_ends = np.arange(size, num_tokens + 1, size)
        if document_end is not None:
            rows = (blocks[np.arange(start, min(start + 1024, len(blocks)))] for start in range(0, len(blocks), 1024))
            is_end = np.concatenate([(row == document_end).ravel() for row in rows])
            document_ends = np.union1d(np.flatnonzero(is_end) + 1, whole)
        return cls(store, *_slide(np.array([0]), whole, size, stride or size), document_ends)

    def __len__(self) -> int:
        return len(self.begins)

    def batch(self, start: int, stop: int) -> Batch:
        """The windows [start, stop)."""
        begins, ends, firsts = (places[start:stop, None] for places in (self.begins, self.ends, self.firsts))
        places = begins + np.arange(int((ends - begins).max()))
        is_text = places < ends
        ids = self._take(np.minimum(places, ends - 1))
        predicted = places[:, 1:]
        counts = is_text[:, 1:] & (predicted >= firsts)
        return Batch(np.where(is_text, ids, 0), counts, np.searchsorted(self.document_ends, predicted, side="right"))

    def _take(self, places: Positions) -> npt.NDArray[np.int64]:
        if not isinstance(self.ids, Path):
            return self.ids[places].astype(np.int64)
        needed, at = np.unique(places // self._blocks.block_size, return_inverse=True)
        return self._blocks[needed][at.reshape(places.shape), places % self._blocks.block_size]

    @cached_property
    def _blocks(self) -> Blocks:
        assert isinstance(self.ids, Path)
        return Blocks(self.ids, "eval")


def check_stride(context: int, stride: int | None) -> None:
    """Raise ConfigError where windows would leave tokens out."""
    if stride is not None and stride > context:
        raise ConfigError(f"--stride {stride} is more than the {context} tokens of a window; name {context} or fewer")


def _slide(starts: Positions, stops: Positions, context: int, stride: int) -> tuple[Positions, Positions, Positions]:
    """Begin, end and first counted place of the windows of texts, one after the other."""
    counts = 1 + np.maximum(0, -(-(stops - starts - context) // stride))
    text = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(text)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = starts[text] + number * stride
    ends = np.minimum(begins + context, stops[text])
    firsts = np.where(number == 0, begins + 1, np.maximum(begins + 1, begins - stride + context))
    return begins, ends, firsts

"""The eval split's loss, the same to the last bit at every number of workers."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from clm_dist.errors import ConfigError, DataError, first_line
from clm_dist.files.blocks import EVAL_BYTES, Blocks, Manifest
from clm_dist.metrics import MicroLoss
from clm_dist.train.documents import num_predicted
from clm_dist.train.forward import block_losses
from clm_dist.train.memory import is_out_of_memory


@dataclass(frozen=True)
class EvalSplit:
    """The eval blocks, cut into micro-batches: number j is blocks [j*m, j*m+m), whichever rank runs it."""

    blocks: Blocks
    micro_size: int
    block_bytes: npt.NDArray[np.int64]
    """Bytes of text of the tokens that each block predicts, (num_blocks,)."""
    num_tokens: int
    """Predicted tokens: the first of a block has nothing before it."""
    document_end: int | None
    """Id of the token at which attention and the loss stop; None where they do not."""

    @classmethod
    def of_store(cls, store: Path, micro_size: int, document_end: int | None = None) -> "EvalSplit":
        masked = document_end is not None
        num_tokens = num_eval_tokens(Manifest.read(store / "manifest.json"), document_mask=masked)
        block_bytes = np.load(store / EVAL_BYTES, mmap_mode="r")[:, int(masked)]
        return cls(Blocks(store, "eval"), micro_size, block_bytes, num_tokens, document_end)

    @property
    def num_micros(self) -> int:
        return -(-len(self.blocks) // self.micro_size)


def num_eval_tokens(manifest: Manifest, *, document_mask: bool) -> int:
    """Predicted tokens of a store's eval split. Raises DataError where there are none."""
    num_tokens = manifest.splits["eval"].num_predicted(manifest.block_size, document_mask=document_mask)
    if num_tokens == 0:
        raise DataError(
            "no block of the eval split has two tokens of one document, so with data.document_mask there is nothing to "
            "evaluate; set data.document_mask to false, or raise data.block_size",
            field="data.document_mask",
        )
    return num_tokens


def evaluate_micros(
    model: nn.Module,
    split: EvalSplit,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    in_step: bool = False,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    on_micro: Callable[[int], None] = lambda done: None,
) -> list[MicroLoss]:
    """This rank's micro-batches of the eval split, each summed in float64.

    Args:
        model: a `WithLoss`, or what a strategy made of it.
        in_step: every rank runs equally many forward passes, as sharded weights need; a rank with nothing left
            repeats a micro-batch that is not counted. Collective then.
        on_micro: called with the number of micro-batches that this rank is done with.
    """
    was_training = model.training
    model.eval()
    micros = []
    rounds = -(-split.num_micros // world_size)
    with torch.no_grad():
        for turn in range(rounds):
            index = turn * world_size + rank
            with enough_memory(split.micro_size):
                if index < split.num_micros:
                    micros.append(_evaluate_micro(model, split, index, device, autocast))
                elif in_step:
                    _evaluate_micro(model, split, 0, device, autocast)
            on_micro(turn + 1)
    model.train(was_training)
    return micros


def split_loss(
    micros: Sequence[MicroLoss], split: EvalSplit, all_reduce: Callable[[list[float]], list[float]]
) -> float:
    """The mean loss of a token of the eval split on every rank, to the last bit what `combine` computes. Collective.

    Args:
        micros: those of this rank.
    """
    own = [0.0] * split.num_micros
    for micro in micros:
        own[micro.index] = micro.loss_sum
    # The other ranks add zeros, which round nothing.
    total = 0.0
    for loss_sum in all_reduce(own):
        total += loss_sum
    return total / split.num_tokens


@contextlib.contextmanager
def enough_memory(micro_size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"eval.micro_size: an evaluation of {micro_size} blocks at a time does not fit into memory "
            f"({first_line(error)}); lower eval.micro_size",
            field="eval.micro_size",
        ) from error


def _evaluate_micro(
    model: nn.Module,
    split: EvalSplit,
    index: int,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> MicroLoss:
    start = index * split.micro_size
    end = min(start + split.micro_size, len(split.blocks))
    ids = split.blocks[np.arange(start, end)]
    ids_BT = torch.from_numpy(ids).to(device)
    with autocast():
        losses = block_losses(model, ids_BT, split.document_end)
    return MicroLoss(
        index=index,
        loss_sum=losses.double().sum().item(),
        num_tokens=num_predicted(ids, split.document_end),
        num_bytes=int(split.block_bytes[start:end].sum()),
    )

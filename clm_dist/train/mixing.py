"""What a model sees: nothing after a token, and, where documents are masked, nothing of other documents.

It is tried, because a model may take positions and not look at them, or see the whole text, as encoders do.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clm_dist.train.attention import attention_of
from clm_dist.train.forward import block_logits, block_losses, name_of, unwrapped
from clm_dist.train.model import why_no_positions

# Of the largest loss of a token: documents alone have other shapes, so other sums are rounded.
_MOVED = {"fp32": 1e-4, "tf32": 5e-2, "bf16": 5e-2, "fp16": 5e-2}
# Nats. A masked token has weight 0 and changes no bit; a mixture of experts rounds by how many tokens an expert gets.
_LEAKED = 1e-4
# As a share of the leak without a mask, because such rounding is not small in half precision.
_LEAKED_SHARE = {"fp32": 0.0, "tf32": 0.02, "bf16": 0.02, "fp16": 0.02}
_TRIED_TOKENS = 128
# Of the largest gradient in an embedding; what is computed by Fourier transforms is not exactly 0.
_SEEN_SHARE = 1e-6


def find_mixing(
    model: nn.Module,
    end: int,
    *,
    block_size: int,
    device: torch.device,
    precision: str,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    any_rank: Callable[[bool], bool] = lambda found: found,
) -> str | None:
    """The problem of a model that mixes the documents of a block; None if it keeps them apart. Collective.

    Two blocks of two documents each, with random tokens: every document must have the losses that it has alone, and
    no loss of the second may change with the tokens of the first. The second holds to the last bit at every precision,
    so it sees what rounding would hide in a model with random weights.

    Args:
        model: a `WithLoss`, or what a strategy made of it.
        any_rank: whether something is so on any rank, the same answer on every rank.
    """
    if problem := why_no_positions(unwrapped(model)):
        return problem
    size = min(block_size, _TRIED_TOKENS)
    short = max(1, size // 3)
    # The blocks' boundaries differ, so that a mask made for one block of a batch fits no other.
    first, second = (slice(0, short), slice(short, size)), (slice(0, size - short), slice(size - short, size))
    generator = torch.Generator().manual_seed(0)
    vocab_size = unwrapped(model).config.get_text_config().vocab_size

    def random_blocks() -> Tensor:
        drawn = torch.randint(vocab_size - 1, (2, size), generator=generator)
        ids_BT = torch.where(drawn >= end, drawn + 1, drawn)
        ids_BT[0, short - 1] = ids_BT[1, size - short - 1] = ids_BT[:, -1] = end
        return ids_BT.to(device)

    packed_BT, changed_BT = random_blocks(), random_blocks()
    for row, (_, kept) in enumerate((first, second)):
        changed_BT[row, kept] = packed_BT[row, kept]

    def losses(ids_BT: Tensor, end: int | None) -> Tensor:
        with torch.no_grad(), autocast():
            return block_losses(model, ids_BT, end)

    def of_document(losses_BT: Tensor, row: int, document: slice) -> Tensor:
        return losses_BT[row, document.start : document.stop - 1]

    def of_second(losses_BT: Tensor) -> Tensor:
        return torch.cat([of_document(losses_BT, 0, first[1]), of_document(losses_BT, 1, second[1])])

    was_training = model.training
    model.eval()
    masked, masked_changed = losses(packed_BT, end), losses(changed_BT, end)
    plain, plain_changed = losses(packed_BT, None), losses(changed_BT, None)
    shorts = losses(torch.stack([packed_BT[0, first[0]], packed_BT[1, second[1]]]), None)
    longs = losses(torch.stack([packed_BT[0, first[1]], packed_BT[1, second[0]]]), None)
    model.train(was_training)

    alone = torch.cat([shorts.flatten(), longs.flatten()])
    together = torch.cat(
        [of_document(masked, *at) for at in ((0, first[0]), (1, second[1]), (0, first[1]), (1, second[0]))]
    )
    moved, largest = _largest(together - alone), _largest(alone)
    leaked, leaked_plain = (
        _largest(of_second(a) - of_second(b)) for a, b in ((masked, masked_changed), (plain, plain_changed))
    )
    apart = moved <= _MOVED[precision] * max(1.0, largest)
    apart = apart and leaked <= max(_LEAKED, _LEAKED_SHARE[precision] * leaked_plain)
    # With broken weights nothing can be seen; the first loss will say so.
    broken = not torch.isfinite(alone).all()
    if not any_rank(not apart and not broken):
        return None
    attention = attention_of(unwrapped(model).config)
    return (
        f"data.document_mask does not work with {name_of(model)} ({attention} attention): in a block of two "
        f"documents a token's loss differs by {moved:.2g} nats from that of the document alone, and by {leaked:.2g} "
        "when the other document changes; set data.document_mask to false, or use a model such as gpt2 or llama"
    )


def find_future(
    model: nn.Module,
    *,
    block_size: int,
    device: torch.device,
    sharded: bool = False,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    any_rank: Callable[[bool], bool] = lambda found: found,
) -> str | None:
    """The problem of a model that sees the tokens which it is to predict; None of one that does not. Collective.

    The losses of the first half of a block of random tokens have no gradient in the embeddings of the second half. That
    is exactly 0 at every precision; a difference of losses would also hold what a mixture of experts rounds.

    Args:
        model: a `WithLoss`, or what a strategy made of it.
        sharded: whether the weights are; what is made for them at the first pass has to be as in training.
        any_rank: whether something is so on any rank, the same answer on every rank.
    """
    first_unseen = block_size // 2
    vocab_size = unwrapped(model).config.get_text_config().vocab_size
    ids_BT = torch.randint(vocab_size, (1, block_size), generator=torch.Generator().manual_seed(0)).to(device)
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        embedded.append(output if output.requires_grad else output.requires_grad_())

    hook = unwrapped(model).get_input_embeddings().register_forward_hook(keep)
    # Reformer adds to the gradients of its parameters by itself.
    tracked = [] if sharded else [p for p in model.parameters() if p.requires_grad]
    for parameter in tracked:
        parameter.requires_grad_(False)
    was_training = model.training
    # Reformer has no gradient otherwise; dropout changes nothing of what is 0.
    model.train()
    with autocast():
        logits_BTV = block_logits(model, ids_BT, None)
    hook.remove()
    # The logits and not the losses: with two tokens there is one, and the last half sees itself.
    early = logits_BTV[:, :first_unseen].float().logsumexp(dim=-1).sum()
    gradient = torch.autograd.grad(early, embedded[0], allow_unused=True)[0] if embedded else None
    model.train(was_training)
    for parameter in tracked:
        parameter.requires_grad_(True)
    leaked = share = 0.0
    if gradient is not None:
        # One row a token, after those of a prompt that some models put before the text.
        rows_TD = gradient.float().reshape(-1, gradient.shape[-1])[-block_size:]
        leaked = _largest(rows_TD[first_unseen:])
        share = leaked / max(_largest(rows_TD), torch.finfo(torch.float32).tiny)
    if not any_rank(share > _SEEN_SHARE):
        return None
    return (
        f"model: {name_of(model)} sees the tokens that it is to predict: the gradient of a prediction in the embedding "
        f"of a token after it is {leaked:.2g}, and has to be 0; use a decoder such as gpt2 or llama"
    )


def _largest(values: Tensor) -> float:
    """The largest magnitude; 0 of nothing, NaN where one is NaN."""
    return float(values.abs().max()) if values.numel() else 0.0

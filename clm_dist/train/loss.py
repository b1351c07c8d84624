"""The loss of predicted tokens.

Of a model with a large vocabulary the logits are the largest tensor of a pass, and their cross entropy would take three
fp32 tensors with as many elements: log-probabilities, which are kept for the backward pass, and two gradients there. So
it is computed for a few tokens at a time, and again in the backward pass, where the gradient takes the place of the
logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from clm_dist.train.loss_parts import tokens_at_once

# Names of autograd's nodes. One that is in neither set costs memory, never a wrong gradient. The last are DeepSpeed's.
_NEEDS_NO_OUTPUT = {
    "AddmmBackward0",
    "DivBackward0",
    "MmBackward0",
    "MulBackward0",
    "ToCopyBackward0",
    "LinearFunctionForZeroStage3Backward",
}
"""Nodes whose backward pass does not need what they returned, as that of tanh does."""
_PASSES_ON = {"UnsafeViewBackward0", "ViewBackward0", "PreBackwardFunctionForModuleBackward"}
"""Nodes that returned what they were given, in another shape."""


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor, document_end: int | None = None) -> Tensor:
    """Loss of every predicted token, (B, T - 1) float32, nats.

    Position t predicts token t + 1. A block holds no padding, and an end-of-sequence token is a token to learn like
    any other, so no label is masked but that of a document's first token, which has loss 0.

    A backward pass may overwrite the logits. A second one of the same losses, and any other use of the logits in a
    backward pass after it, is then an error; but not inside `saved_tensors_hooks`, with which autograd does not look.

    Args:
        document_end: id that ends a document; None predicts documents' first tokens from what was before them.
    """
    # The last position's label is padded and its loss cut off: cutting the logits would copy them (25 % slower).
    labels_BT = pad(ids_BT[:, 1:], (0, 1), value=-100)
    if document_end is not None:
        labels_BT = labels_BT.masked_fill(ids_BT == document_end, -100)
    logits_NV, labels_N = logits_BTV.flatten(0, 1), labels_BT.flatten()
    at_once = tokens_at_once(logits_NV.shape[1], on_cpu=logits_NV.device.type == "cpu")
    if len(logits_NV) <= at_once or torch.compiler.is_compiling():
        # A compiler finds by itself what need not be kept.
        losses_N = _losses(logits_NV, labels_N)
    else:
        losses_N = _InParts.apply(logits_NV, labels_N, at_once, _may_be_overwritten(logits_NV))  # type: ignore[no-untyped-call]
    return losses_N.view_as(ids_BT)[:, :-1]


class _InParts(torch.autograd.Function):
    """The losses of N tokens and the gradient of their logits, as `_losses` has them, but for a few at a time."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, at_once: int, overwrites: bool) -> Tensor:
        ctx.save_for_backward(logits_NV, labels_N)
        ctx.at_once, ctx.overwrites = at_once, overwrites
        parts = zip(logits_NV.split(at_once), labels_N.split(at_once), strict=True)  # type: ignore[no-untyped-call]
        return torch.cat([_losses(logits, labels) for logits, labels in parts])

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("the loss in parts has no second derivative (create_graph=True)")
        logits_NV, labels_N = ctx.saved_tensors
        gradient_NV = logits_NV if ctx.overwrites else torch.empty_like(logits_NV)
        tensors = (gradient_NV, logits_NV, labels_N, gradient_N)
        for into, logits, labels, gradient in zip(*(tensor.split(ctx.at_once) for tensor in tensors), strict=True):
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                losses = _losses(leaf, labels)
            into.copy_(torch.autograd.grad(losses, leaf, gradient)[0])
        return gradient_NV, None, None, None


def _losses(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return cross_entropy(logits_NV.float(), labels_N, reduction="none")


def _may_be_overwritten(logits: Tensor) -> bool:
    node = logits.grad_fn
    while node is not None and node.name() in _PASSES_ON:
        node = node.next_functions[0][0]
    return node is not None and node.name() in _NEEDS_NO_OUTPUT

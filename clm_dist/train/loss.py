"""The loss of predicted tokens."""

from torch import Tensor
from torch.nn.functional import cross_entropy, pad


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor, document_end: int | None = None) -> Tensor:
    """Loss of every predicted token, (B, T - 1) float32, nats.

    Position t predicts token t + 1. A block holds no padding, and an end-of-sequence token is a token to learn like
    any other, so no label is masked but that of a document's first token, which has loss 0.

    Args:
        document_end: id that ends a document; None predicts documents' first tokens from what was before them.
    """
    # The last position's label is padded and its loss cut off: cutting the logits would copy them (25 % slower).
    labels_BT = pad(ids_BT[:, 1:], (0, 1), value=-100)
    if document_end is not None:
        labels_BT = labels_BT.masked_fill(ids_BT == document_end, -100)
    losses = cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="none")
    return losses.view_as(ids_BT)[:, :-1]

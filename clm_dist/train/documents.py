"""Documents inside a block: where attention and the loss stop with `data.document_mask`.

A document ends with the end-of-sequence token (0 here). What a block begins with, the rest of a document from an
earlier block, is a document of its own:

    ids         7  0  5  6  0  9
    positions   0  1  0  1  2  0      restart at each document
    predicted      0     6  0         5 and 9 begin a document, so no token before them is theirs

The positions are all that a model is told; from where they restart transformers builds the attention mask (`sdpa`,
`eager`, `flex_attention`) or the lengths of the sequences (`flash_attention_2` and later). A model may take positions
and not look at them, so `find_mixing` tries it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from clm_dist.pretrained.tokenizer import load_tokenizer


def document_end_of(store: Path) -> int:
    """Id of the token that ends a document in a store's blocks."""
    return int(load_tokenizer(store / "tokenizer").eos_token_id)


def num_predicted(ids: npt.NDArray[np.int64], end: int | None) -> int:
    """Tokens of whole blocks, (B, T), that are predicted."""
    return ids[:, 1:].size if end is None else int((ids[:, :-1] != end).sum())


def document_positions(ids_BT: Tensor, end: int) -> Tensor:
    """Each token's place in its document, (B, T) int64."""
    begins_BT = pad(ids_BT[:, :-1] == end, (1, 0), value=False)
    place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return place_T - torch.where(begins_BT, place_T, 0).cummax(dim=-1).values


def block_logits(model: nn.Module, ids_BT: Tensor, end: int | None) -> Tensor:
    """The model's prediction after each token of whole blocks, (B, T, V).

    Args:
        end: id that ends a document, where attention stops at documents; None where it sees the whole block.
    """
    if end is None:
        logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV
    positions_BT = document_positions(ids_BT, end)
    if not _is_flash(model):
        logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
        return logits_BTV
    # Flash attention looks at positions in a batch of one row only, and would take the rows for one document each.
    logits_1NV = model(
        input_ids=ids_BT.reshape(1, -1), position_ids=positions_BT.reshape(1, -1), use_cache=False
    ).logits
    logits_BTV = logits_1NV.view(*ids_BT.shape, -1)
    return logits_BTV


def unwrapped(model: nn.Module) -> Any:
    """The transformers model in what DDP or DeepSpeed made of it."""
    return getattr(model, "module", model)


def attention_of(model: nn.Module) -> str:
    return str(unwrapped(model).config.get_text_config()._attn_implementation)


def _is_flash(model: nn.Module) -> bool:
    # `flash_attention_2`, `flash_attention_3`, `kernels-community/flash-attn2`, ...
    return "flash" in attention_of(model)

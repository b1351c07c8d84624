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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
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

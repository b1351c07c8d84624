"""How many tokens a tokenizer needs for text."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clm_dist.files.blocks import Blocks

# Enough for figures that hold, and read in no time.
_SAMPLE_TOKENS = 2**18
_WORDS = re.compile(r"\S+")
_TOP_WORDS = 8


@dataclass(frozen=True)
class Fertility:
    """How many tokens a tokenizer needs for text, in a sample of blocks."""

    tokens_per_word: float
    bytes_per_token: float
    costliest: tuple[tuple[str, int, int], ...]
    """Words that take the most tokens of the sample beyond their first: word, tokens of it, how often it is there."""


def sample_of_blocks(blocks: Blocks) -> npt.NDArray[np.int64]:
    """Blocks from all over a split, in which there are about _SAMPLE_TOKENS tokens: (num_blocks, block_size) ids."""
    num_blocks = min(len(blocks), max(1, _SAMPLE_TOKENS // blocks.block_size))
    return blocks[np.linspace(0, len(blocks) - 1, num_blocks).astype(np.int64)]


def measure_fertility(tokenizer: Any, blocks: Any) -> Fertility:
    """Tokens a word and bytes a token of blocks, (num_blocks, block_size) ids.

    A word is what lies between white space. Words are encoded with the space before them, as they stand in a text.
    """
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in blocks]
    num_tokens = int(np.isin(blocks, tokenizer.all_special_ids, invert=True).sum())
    words = Counter(word for text in texts for word in _WORDS.findall(text))
    encoded = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"] if words else []
    sizes = {word: len(ids) for word, ids in zip(words, encoded, strict=True)}
    costs = sorted(words, key=lambda word: (-(sizes[word] - 1) * words[word], word))
    return Fertility(
        tokens_per_word=num_tokens / max(1, words.total()),
        bytes_per_token=sum(len(text.encode()) for text in texts) / max(1, num_tokens),
        costliest=tuple((word, sizes[word], words[word]) for word in costs[:_TOP_WORDS]),
    )

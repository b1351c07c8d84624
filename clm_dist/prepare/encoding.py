"""How documents become ids: special tokens around a text, its end, and the bytes of every token."""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from clm_dist.config.data import DataConfig
from clm_dist.errors import ConfigError, DataError
from clm_dist.files.shards import Ids, TokenBytes, token_dtype

_PREFIXED = '"add_prefix_space": true'


@dataclass(frozen=True)
class Encoding:
    """How documents become ids: what any process needs to do it, with no file to read."""

    tokenizer_json: str
    prefix: tuple[int, ...]
    """Special tokens that the tokenizer puts before a text."""
    suffix: tuple[int, ...]
    eos: int | None
    """Appended to a document that does not end with it; None appends nothing."""
    token_bytes: TokenBytes
    dtype: np.dtype[Any]
    is_byte_level: bool
    """Whether every byte of a text is in one of its tokens, as it is."""
    has_dummy_prefix: bool
    """Whether a text is encoded with a space before it, as SentencePiece does."""

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, data: DataConfig) -> Self:
        """Raises DataError where EOS is to be appended and the tokenizer has none, or where ids need over 32 bits."""
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        eos = tokenizer.eos_token_id if data.append_eos else None
        if data.append_eos and eos is None:
            raise DataError(
                "data.append_eos is on, but the tokenizer has no end-of-sequence token; "
                "set data.append_eos to false, or use a tokenizer that has one",
                field="data.append_eos",
            )
        prefix, suffix = _special_tokens(backend)
        tokenizer_json = backend.to_str()
        described = described_by(tokenizer_json)
        token_bytes = _token_bytes(tokenizer, json.dumps(described.get("decoder")))
        before = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
        return cls(
            tokenizer_json=tokenizer_json,
            prefix=prefix,
            suffix=suffix,
            eos=eos,
            token_bytes=token_bytes,
            dtype=token_dtype(len(token_bytes)),
            is_byte_level=described.get("normalizer") is None and '"ByteLevel"' in before and _PREFIXED not in before,
            has_dummy_prefix=any(word in before for word in ('"Prepend"', '"always"', '"first"', _PREFIXED)),
        )


@lru_cache(maxsize=1)
def described_by(tokenizer_json: str) -> dict[str, Any]:
    """A tokenizer.json without its model: parsed once, because a vocabulary takes tenths of a second."""
    described: dict[str, Any] = json.loads(tokenizer_json)
    described.pop("model", None)
    return described


@dataclass(frozen=True)
class Tokens:
    """The ids of documents, one after the other."""

    ids: Ids
    """(num_tokens,)"""
    offsets: npt.NDArray[np.int64]
    """Where each document begins, and where the last one ends, (num_documents + 1,)."""


def _special_tokens(backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after every text."""
    plain, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    raise ConfigError(
        "the tokenizer changes a text's own tokens when it adds special tokens, which is not supported; use another "
        "with tokenizer.path",
        field="tokenizer.path",
    )


def completed(tokens: Tokens, encoding: Encoding) -> Tokens:
    """The ids with the special tokens around every document, and EOS where it does not end with it."""
    ids, offsets = tokens.ids, tokens.offsets
    prefix, suffix = encoding.prefix, encoding.suffix
    before = np.full(len(offsets) - 1, len(prefix))
    after = np.full(len(offsets) - 1, len(suffix))
    if encoding.eos is not None and encoding.eos not in suffix[-1:]:
        suffix = (*suffix, encoding.eos)
        # Some tokenizers end a text themselves, and some texts spell EOS out.
        ends = np.zeros(len(after), bool)
        if len(suffix) == 1 and len(ids):
            ends = (np.diff(offsets) > 0) & (ids[np.maximum(offsets[1:] - 1, 0)] == encoding.eos)
        after = after + ~ends
    added = np.concatenate([[0], np.cumsum(before + after)])
    if not added[-1]:
        return Tokens(ids.astype(encoding.dtype, copy=False), offsets)
    out = np.empty(len(ids) + added[-1], encoding.dtype)
    whole = offsets + added
    is_text = np.ones(len(out), bool)
    for place, token in enumerate(prefix):
        is_text[whole[:-1] + place] = False
        out[whole[:-1] + place] = token
    for place, token in enumerate(suffix):
        put = after > place
        at = whole[1:][put] - after[put] + place
        is_text[at] = False
        out[at] = token
    out[is_text] = ids
    return Tokens(out, whole)


def _token_bytes(tokenizer: Any, decoder: str) -> TokenBytes:
    """Bytes of text that each token of the vocabulary stands for, (vocab_size,); 0 for special tokens."""
    special = set(tokenizer.all_special_ids)
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(1 + max(vocabulary.values()), np.uint16)
    for piece, index in vocabulary.items():
        if index not in special:
            sizes[index] = _num_bytes(piece, decoder)
    return sizes


def _num_bytes(piece: str, decoder: str) -> int:
    if '"ByteLevel"' in decoder:
        # Every character of such a piece stands for one byte.
        return len(piece)
    if '"ByteFallback"' in decoder and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.removeprefix("##").replace("\u2581", " ").encode())

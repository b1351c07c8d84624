"""Bytes of text that each token of a document stands for."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from clm_dist.prepare.encoding import Encoding, Tokens
from clm_dist.prepare.engines import Reference, build_engine


def token_sizes(tokens: Tokens, texts: pa.Array, encoding: Encoding) -> npt.NDArray[np.uint32] | None:
    """Bytes of text that each token stands for, exactly, (num_tokens,); None where the vocabulary's table says them.

    It does for every document whose tokens' bytes add up to the text's: for byte-level tokenizers that is each, unless
    a text spells out a special token. Others are encoded once more, with offsets; but where the one byte too many is
    the space that a tokenizer puts before a text, that is taken off the first token.
    """
    sizes = encoding.token_bytes.take(tokens.ids)
    num_bytes = pa.compute.binary_length(texts).to_numpy()
    # With no normalizer a token stands for at least as many bytes as the table says, so sums cannot cancel out.
    if encoding.is_byte_level and sizes.sum(dtype=np.int64) == num_bytes.sum():
        return None
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[tokens.offsets]
    surplus = np.diff(ends) - num_bytes
    wrong = np.flatnonzero(surplus)
    if not len(wrong):
        return None
    exact = sizes.astype(np.uint32)
    reference = build_engine(Reference.name, encoding.tokenizer_json)
    assert isinstance(reference, Reference)
    skipped = len(encoding.prefix)
    for index in wrong.tolist():
        start, stop = tokens.offsets[index] + skipped, tokens.offsets[index + 1]
        if encoding.has_dummy_prefix and surplus[index] == 1 and exact[start] > 0:
            exact[start] -= 1
            continue
        exact[start:stop] = 0
        spans = reference.spans(texts[index].as_py())
        exact[start : start + len(spans)] = spans
    return exact

"""Encoders: the reference tokenizer, and a faster engine where it was seen to return the same ids."""

import contextlib
import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from clm_dist.errors import ConfigError, first_line
from clm_dist.prepare.encoding import Encoding, Tokens, described_by

logger = logging.getLogger(__name__)


# What engines are likeliest to disagree on, and a sample of the data may not have.
_HARD_TEXTS = (
    "\n\n\ufeffx \u200b's e\u0301\u0323 \u1100\u1161\u11a8",
    "don't DON'T we'LL \u2019s  1234567 \u00bd\u0662 x_y\t\r\n \n",
    "\U0001f468\u200d\U0001f469 \u4f60\u597d\u3000\u00a0\u2028 \ufb01\u0130 \u0000",
)


class EngineError(Exception):
    """The fast engine does not support the tokenizer, or returns other ids than the reference."""


class Reference:
    """The engine that the others are measured by: the fast tokenizer that the model ships."""

    name = "tokenizers"

    def __init__(self, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer_json)

    def encode(self, texts: pa.Array, *, parallel: bool = False) -> Tokens:
        """The ids of documents, with nothing added.

        Args:
            texts: (num_documents,) large_string.
            parallel: use all cores in one call. This library does what TOKENIZERS_PARALLELISM says.
        """
        # The library returns a document's ids as a list, which lives until the next one is copied.
        encoded = self._backend.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
        arrays = [np.fromiter(encoding.ids, np.uint32, len(encoding)) for encoding in encoded]
        offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)
        return Tokens(np.concatenate([np.empty(0, np.uint32), *arrays]), offsets)

    def spans(self, text: str) -> npt.NDArray[np.uint32]:
        """Bytes of a text that each of its tokens stands for, without special tokens, (num_tokens,).

        A token stands for what lies between the end of the token before and its own end: what a tokenizer drops, such
        as white space, goes to the token that follows, and the last one takes what is left. The sum is the text's.
        """
        ends = np.array([end for _, end in self._backend.encode(text, add_special_tokens=False).offsets], np.int64)
        sizes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        num_bytes = np.concatenate([[0], np.cumsum(1 + (sizes > 0x7F) + (sizes > 0x7FF) + (sizes > 0xFFFF))])
        if len(ends):
            ends = np.maximum.accumulate(ends)
            ends[-1] = len(text)
        return np.diff(num_bytes[ends], prepend=0).astype(np.uint32)


class Gigatoken:
    """The fast engine; only for tokenizers whose ids it is seen to give, see `choose_engine`."""

    name = "gigatoken"

    def __init__(self, tokenizer_json: str) -> None:
        """Raises EngineError where the tokenizer is not supported."""
        if problem := _not_for_gigatoken(described_by(tokenizer_json)):
            raise EngineError(problem)
        with _rust():
            import gigatoken

            self._tokenizer = gigatoken.Tokenizer.from_json(tokenizer_json)

    def encode(self, texts: pa.Array, *, parallel: bool = False) -> Tokens:
        """See `Reference.encode`."""
        import awkward

        _, offsets, data = texts.buffers()
        begins = np.frombuffer(offsets, np.int64, len(texts) + 1, 8 * texts.offset)
        characters = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
        layout = awkward.contents.ListOffsetArray(
            awkward.index.Index64(begins),
            awkward.contents.NumpyArray(characters, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
        # Its buffers are Arrow's and numpy's own: no text and no token is ever a Python object.
        with _rust():
            encoded = self._tokenizer.encode_batch(awkward.Array(layout), parallel=parallel).layout
        ends, ids = encoded.offsets.data, encoded.content.data
        return Tokens(ids[ends[0] : ends[-1]], ends - ends[0])


Engine = Reference | Gigatoken


@contextlib.contextmanager
def _rust() -> Iterator[None]:
    """Turn whatever gigatoken raises into EngineError: a panic in Rust is not an Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise EngineError(first_line(error)) from None


def _not_for_gigatoken(tokenizer: dict[str, Any]) -> str | None:
    """Which setting of a tokenizer.json gigatoken 0.10 takes and does not follow, found by comparing random texts."""
    for token in tokenizer.get("added_tokens") or ():
        if token.get("single_word"):
            return f"it does not know single_word, which the added token {token['content']!r} has"
        if token.get("normalized") and tokenizer.get("normalizer"):
            return f"it does not normalize the added token {token['content']!r}"
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    splits = False
    for step in steps:
        if step.get("type") == "ByteLevel" and not step.get("use_regex", True) and not splits:
            return "it does not know a ByteLevel without its pattern"
        splits = splits or step.get("type") == "Split"
    return None


@lru_cache(maxsize=2)
def build_engine(name: str, tokenizer_json: str) -> Engine:
    """An engine, the same for all partitions of a process. Raises EngineError, see `Gigatoken`."""
    return Reference(tokenizer_json) if name == Reference.name else Gigatoken(tokenizer_json)


def choose_engine(wanted: str, encoding: Encoding, sample: pa.Array) -> str:
    """The engine for a job: the fast one where it returns the reference's ids on a sample of the data's own texts.

    Args:
        wanted: `tokenizer.engine` of the job.

    Raises:
        ConfigError: the job insists on gigatoken, and it does not give these ids.
    """
    if wanted == Reference.name:
        return wanted
    try:
        engine = build_engine(Gigatoken.name, encoding.tokenizer_json)
        check_engine(engine, encoding, sample)
        check_engine(engine, encoding, _hard_texts(encoding), "hard texts")
    except EngineError as error:
        if wanted == Gigatoken.name:
            raise ConfigError(
                f"tokenizer.engine gigatoken cannot be used: {error}; set tokenizer.engine to auto",
                field="tokenizer.engine",
            ) from None
        logger.info("tokenizers encodes, as gigatoken cannot: %s", error)
        return Reference.name
    return Gigatoken.name


def _hard_texts(encoding: Encoding) -> pa.Array:
    """Texts that engines are likeliest to disagree on, with every added token of the tokenizer among them."""
    added = [token["content"] for token in described_by(encoding.tokenizer_json).get("added_tokens") or ()]
    around = [text.format(token) for token in added for text in ("{}", "a{}b", " {} ", "\n{}\n", "{0}{0}", "1{}.")]
    return pa.array([*_HARD_TEXTS, *around], pa.large_string())


def check_engine(engine: Engine, encoding: Encoding, sample: pa.Array, what: str = "the data's own text") -> None:
    """Raise EngineError if an engine returns other ids than the reference. `what` names the sample, for the message."""
    found, expected = engine.encode(sample), build_engine(Reference.name, encoding.tokenizer_json).encode(sample)
    if not (np.array_equal(found.ids, expected.ids) and np.array_equal(found.offsets, expected.offsets)):
        raise EngineError(f"it gives other ids than {Reference.name} on {what}")


def sample_of(texts: pa.Array, num_bytes: int) -> pa.Array:
    """The beginnings of evenly spaced documents, about `num_bytes` of text in all; at least one document."""
    every = max(1, texts.nbytes // num_bytes)
    some = texts.take(pa.array(np.arange(0, len(texts), every)))
    sample = pa.compute.utf8_slice_codeunits(some, 0, num_bytes)
    ends = np.cumsum(pa.compute.binary_length(sample).to_numpy())
    return pa.concat_arrays([sample[: 1 + int(np.searchsorted(ends, num_bytes))]])

"""Documents to token ids, with the tokenizer that the model ships or one trained on the job's text."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from clm_dist.config.data import DataConfig, TokenizerTraining
from clm_dist.errors import ConfigError, DataError, first_line
from clm_dist.files.blocks import Ids, TokenBytes, token_dtype

logger = logging.getLogger(__name__)

# Whatever of these a tokenizer has decides which ids a text gets.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_EOS = "<|endoftext|>"
_PREFIXED = '"add_prefix_space": true'
# What engines are likeliest to disagree on, and a sample of the data may not have.
_HARD_TEXTS = (
    "\n\n\ufeffx \u200b's e\u0301\u0323 \u1100\u1161\u11a8",
    "don't DON'T we'LL \u2019s  1234567 \u00bd\u0662 x_y\t\r\n \n",
    "\U0001f468\u200d\U0001f469 \u4f60\u597d\u3000\u00a0\u2028 \ufb01\u0130 \u0000",
)


def locate_tokenizer(path: str, field: str) -> Path:
    """A directory with the tokenizer's files: the one that was named, or a Hub model's in the local cache."""
    directory = Path(path)
    # Path.is_dir raises for a name that is too long.
    if os.path.isdir(path):  # noqa: PTH112
        if not any((directory / name).is_file() for name in _FILES):
            raise ConfigError(
                f"{field} {path} holds no tokenizer (none of {', '.join(_FILES)}); set tokenizer.path", field=field
            )
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{field} {path} is neither a directory nor reachable on the Hub: {first_line(error)}; check the spelling, "
            "your network and, for a private or gated model, `hf auth login`",
            field=field,
        ) from None


def tokenizer_fingerprint(directory: Path) -> str:
    """16 hex digits of the files that decide which ids a text gets."""
    digest = hashlib.sha256()
    for name in _FILES:
        if (directory / name).is_file():
            digest.update(name.encode() + b"\0" + (directory / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def train_tokenizer(documents: Iterable[str], training: TokenizerTraining, directory: Path) -> None:
    """Train a byte-level BPE tokenizer and write it; the same documents give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=training.vocab_size,
        special_tokens=[_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS, bos_token=_EOS)
    fast.save_pretrained(directory)


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
        described = json.loads(backend.to_str())
        before = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
        return cls(
            tokenizer_json=backend.to_str(),
            prefix=prefix,
            suffix=suffix,
            eos=eos,
            token_bytes=_token_bytes(tokenizer, json.dumps(described.get("decoder"))),
            dtype=token_dtype(_num_ids(tokenizer)),
            is_byte_level=described.get("normalizer") is None and '"ByteLevel"' in before and _PREFIXED not in before,
            has_dummy_prefix=any(word in before for word in ('"Prepend"', '"always"', '"first"', _PREFIXED)),
        )


@dataclass(frozen=True)
class Tokens:
    """The ids of documents, one after the other."""

    ids: Ids
    """(num_tokens,)"""
    offsets: npt.NDArray[np.int64]
    """Where each document begins, and where the last one ends, (num_documents + 1,)."""


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of a directory. Raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{directory} holds no tokenizer that loads: {first_line(error)}", field="tokenizer.path"
        ) from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"the tokenizer of {directory} has no fast version; name one that has a tokenizer.json",
            field="tokenizer.path",
        )
    return tokenizer


class EngineError(Exception):
    """The fast engine does not support the tokenizer, or gives other ids than the reference."""


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
        # The library gives a document's ids as a list; it lives until the next one is copied.
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
        if problem := _not_for_gigatoken(json.loads(tokenizer_json)):
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
    """Turn whatever gigatoken raises into EngineError: a panic in Rust is no Exception."""
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
    """The engine for a job: the fast one where it gives the reference's ids on a sample of the data's own texts.

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
    added = [token["content"] for token in json.loads(encoding.tokenizer_json).get("added_tokens") or ()]
    around = [text.format(token) for token in added for text in ("{}", "a{}b", " {} ", "\n{}\n", "{0}{0}", "1{}.")]
    return pa.array([*_HARD_TEXTS, *around], pa.large_string())


def check_engine(engine: Engine, encoding: Encoding, sample: pa.Array, what: str = "the data's own text") -> None:
    """Raises EngineError where an engine gives other ids than the reference; `what` says what the sample is."""
    found, expected = engine.encode(sample), build_engine(Reference.name, encoding.tokenizer_json).encode(sample)
    if not (np.array_equal(found.ids, expected.ids) and np.array_equal(found.offsets, expected.offsets)):
        raise EngineError(f"it gives other ids than {Reference.name} on {what}")


def sample_of(texts: pa.Array, num_bytes: int) -> pa.Array:
    """About so many bytes of text from evenly spaced documents, of each its beginning; at least one document."""
    every = max(1, texts.nbytes // num_bytes)
    some = texts.take(pa.array(np.arange(0, len(texts), every)))
    sample = pa.compute.utf8_slice_codeunits(some, 0, num_bytes)
    ends = np.cumsum(pa.compute.binary_length(sample).to_numpy())
    return pa.concat_arrays([sample[: 1 + int(np.searchsorted(ends, num_bytes))]])


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


def _special_tokens(backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and after every text."""
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
    sizes = np.zeros(_num_ids(tokenizer), np.uint16)
    for piece, index in tokenizer.get_vocab().items():
        if index not in special:
            sizes[index] = _num_bytes(piece, decoder)
    return sizes


def _num_ids(tokenizer: Any) -> int:
    """One more than the highest id; a vocabulary may have gaps."""
    return 1 + int(max(tokenizer.get_vocab().values()))


def _num_bytes(piece: str, decoder: str) -> int:
    if '"ByteLevel"' in decoder:
        # Every character of such a piece stands for one byte.
        return len(piece)
    if '"ByteFallback"' in decoder and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.removeprefix("##").replace("\u2581", " ").encode())

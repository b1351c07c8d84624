"""Documents to token ids, with the tokenizer that the model ships or one trained on the job's text."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from clm_dist.config import DataConfig, TokenizerTraining
from clm_dist.errors import ConfigError, DataError, first_line
from clm_dist.shards import Ids, TokenBytes, token_dtype

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


class Encoder:
    """The reference engine: the fast tokenizer that the model ships, with the special tokens that it adds itself."""

    engine = "tokenizers"

    def __init__(self, directory: Path, data: DataConfig) -> None:
        from transformers import AutoTokenizer

        self.directory = directory
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{directory} holds no tokenizer that loads: {first_line(error)}", field="tokenizer.path"
            ) from None
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"the tokenizer of {directory} has no fast version; name one that has a tokenizer.json",
                field="tokenizer.path",
            )
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos: int | None = None
        """Id that ends every document; None where documents have no ends."""
        if data.append_eos:
            self.eos = self.tokenizer.eos_token_id
            if self.eos is None:
                raise DataError(
                    "data.append_eos is on, but the tokenizer has no end-of-sequence token; "
                    "set data.append_eos to false, or use a tokenizer that has one",
                    field="data.append_eos",
                )
        self.dtype = token_dtype(len(self.tokenizer))

    def encode(self, documents: Sequence[str]) -> list[Ids]:
        """The ids of each document, (num_tokens,)."""
        arrays = []
        for encoding in self._backend.encode_batch_fast(list(documents), add_special_tokens=True):
            ids = encoding.ids
            # Some tokenizers end a text themselves.
            if self.eos is not None and (not ids or ids[-1] != self.eos):
                ids.append(self.eos)
            arrays.append(np.array(ids, self.dtype))
        return arrays

    def token_bytes(self) -> TokenBytes:
        """As it follows from the vocabulary: whether it is so for a text shows when the text is encoded."""
        decoder = json.dumps(json.loads(self._backend.to_str()).get("decoder"))
        special = set(self.tokenizer.all_special_ids)
        sizes = np.zeros(len(self.tokenizer), np.uint16)
        for piece, index in self.tokenizer.get_vocab().items():
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

"""The tokenizer that the model ships: its files, what stands for them in a fingerprint, and how it loads."""

import hashlib
import os
from pathlib import Path
from typing import Any

from clm_dist.errors import ConfigError, first_line
from clm_dist.files.hub_errors import describe_hub_error

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
        raise describe_hub_error(
            error,
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

"""The tokenizer that the model ships: its files, what stands for them in a fingerprint, and how it loads."""

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clm_dist.errors import ConfigError, first_line
from clm_dist.files.hub_errors import describe_hub_error, downloading
from clm_dist.pretrained.late_torch import import_without_torch
from clm_dist.pretrained.passing import raise_if_passing

# What most tokenizers have. A loader may read others, which is seen when it does; see `tokenizer_fingerprint`.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_NEVER = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".md", ".py"}
_NEVER_NAMES = {"config.json", "generation_config.json", "model.safetensors.index.json", ".gitattributes", "LICENSE"}


def locate_tokenizer(path: str, field: str, revision: str | None = None) -> Path:
    """A directory with the tokenizer's files: the one that was named, or a Hub model's in the local cache.

    Args:
        revision: branch, tag or commit of a Hub model.
    """
    directory = Path(path)
    # Path.is_dir raises for a name that is too long.
    if os.path.isdir(path):  # noqa: PTH112
        if not any((directory / name).is_file() for name in _FILES) and not _others(directory):
            raise ConfigError(
                f"{field} {path} holds no tokenizer (none of {', '.join(_FILES)}); set tokenizer.path", field=field
            )
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [*_FILES, "config.json"]
        directory = Path(downloading(snapshot_download, path, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _not_reachable(error, path, field) from None
    # The directory's name is the commit, and what else the loader reads is put there.
    load_tokenizer(path, revision=directory.name, field=field)
    return directory


def tokenizer_fingerprint(directory: Path) -> str:
    """16 hex digits of the files that decide which ids a text gets, and of all else that the loader reads."""
    digest = hashlib.sha256()
    others = sorted(_others(directory) and _read_by_loader(directory))
    for name in [*_FILES, *others]:
        if (directory / name).is_file():
            digest.update(name.encode() + b"\0" + (directory / name).read_bytes() + b"\0")
    described, config = (_json_of(directory / name) for name in ("tokenizer_config.json", "config.json"))
    kind, model_type = described.get("tokenizer_class"), config.get("model_type")
    if model_type and (kind is None or not _is_class_of(str(kind), str(model_type))):
        # Then the type of the model has a say in which class it is.
        digest.update(str(model_type).encode())
    return digest.hexdigest()[:16]


def _is_class_of(kind: str, model_type: str) -> bool:
    """Whether transformers takes this class of tokenizers for models of a type."""
    import_without_torch()
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    return str(TOKENIZER_MAPPING_NAMES.get(model_type, kind)).removesuffix("Fast") == kind.removesuffix("Fast")


def _json_of(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the loader says what is wrong with it
        return {}
    return values if isinstance(values, dict) else {}


def _others(directory: Path) -> set[str]:
    """Files beside the known ones that a tokenizer's loader might read."""
    files = (file for file in directory.rglob("*") if file.is_file() and file.suffix not in _NEVER)
    return {str(file.relative_to(directory)) for file in files} - _NEVER_NAMES - set(_FILES)


def _read_by_loader(directory: Path) -> set[str]:
    """The files beside the known ones that the loader reads."""
    with _opened_files() as opened:
        tokenizer = load_tokenizer(directory)
    # Libraries that are not Python are given the names.
    opened |= {value for value in tokenizer.init_kwargs.values() if isinstance(value, str)}
    read = {os.path.abspath(name) for name in opened}  # noqa: PTH100  # resolves no link, as the loader does not
    return {name for name in _others(directory) if str(directory.absolute() / name) in read}


_watched: ContextVar[set[str] | None] = ContextVar("_watched", default=None)


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    seen = _watched.get() if event == "open" else None
    if seen is not None and isinstance(arguments[0], (str, os.PathLike)):
        seen.add(os.fspath(arguments[0]))


@contextlib.contextmanager
def _opened_files() -> Iterator[set[str]]:
    """The names of the files that Python opens meanwhile."""
    _hook()
    opened: set[str] = set()
    token = _watched.set(opened)
    try:
        yield opened
    finally:
        _watched.reset(token)


@functools.cache
def _hook() -> None:
    sys.addaudithook(_see)  # for ever: Python removes none


def load_tokenizer(
    path: Path | str, *, revision: str | None = None, field: str | None = None, slow: bool = False
) -> Any:
    """The tokenizer of a directory or of a Hub model.

    Args:
        slow: also one without a fast version, which can write text but prepares none.

    Raises:
        ConfigError: there is none, it does not load, or it needs a package that is not installed.
        StorageError: its files cannot be read now.
        HubError: the Hub is away.
    """
    import_without_torch()
    from transformers import AutoTokenizer

    try:
        tokenizer = downloading(AutoTokenizer.from_pretrained, path, revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever its class raises over its files
        raise_if_passing(error, f"the tokenizer of {path}")
        problem = f"{path} holds no tokenizer that loads: {first_line(error)}"
        if "tiktoken" in str(error) and not find_spec("sentencepiece") and _is_sentencepiece(path):
            # What transformers tries last is not what is missing.
            problem = f"the tokenizer of {path} is a SentencePiece model; pip install sentencepiece protobuf to read it"
        elif isinstance(error, OSError) and not Path(path).is_dir():
            raise _not_reachable(error, path, field) from None
        raise ConfigError(problem, field=field) from None
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        # What transformers makes of a directory without a vocabulary.
        raise ConfigError(
            f"{field or 'the model'} {path} holds no tokenizer: it has no vocabulary; set tokenizer.path", field=field
        )
    if getattr(tokenizer, "backend_tokenizer", None) is None and not slow:
        raise ConfigError(
            f"the tokenizer of {path} has no fast version; name one that has a tokenizer.json", field=field
        )
    return tokenizer


def _is_sentencepiece(path: Path | str) -> bool:
    """Whether there is a file of SentencePiece; of a Hub model that is not known here."""
    return not Path(path).is_dir() or any(Path(path).glob("*.model"))


def _not_reachable(error: Exception, path: Path | str, field: str | None) -> Exception:
    return describe_hub_error(
        error,
        f"{f'{field} ' if field else ''}{path} is neither a directory nor reachable on the Hub: {first_line(error)}; "
        "check the spelling, your network and, for a private or gated model, `hf auth login`",
        field=field,
    )


def num_ids(tokenizer: Any) -> int:
    """One more than the highest id: the rows of an embedding that has all of them. A vocabulary may have gaps."""
    return 1 + int(max(tokenizer.get_vocab().values()))

"""Which files of a directory are the data of a job's split, by the rules of `datasets`, which makes such directories.

Hidden files are no data, nor is the card of a data set. A file whose name, or whose directory's name, has the word of a
split belongs to that split, `data/test-00000-of-00001.parquet` for example; all others are train.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Generic, TypeVar

_File = TypeVar("_File")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?:^|/)data/(\w+)-\d{5}-of-\d{5}[^/]*$")
_NO_DATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}


@dataclass(frozen=True)
class Chosen(Generic[_File]):
    """The files of a split."""

    files: list[_File]
    splits: list[str]
    """All splits of the directory."""
    left_out: str
    """What was left out, in words; empty where nothing was that a person could miss."""


def choose(
    named: Iterable[tuple[str, _File]], split: str, is_known: Callable[[_File], bool], elsewhere: str | None = None
) -> Chosen[_File]:
    """The files that belong to a split.

    Args:
        named: files with their paths inside the directory, with slashes.
        is_known: whether a file is of a kind that can be read.
        elsewhere: another split that is read, so that its files are not left out.
    """
    seen = [(path, file) for name, file in named if not _is_hidden(path := PurePosixPath(name))]
    # Beside the records that `save_to_disk` writes.
    saved = {name.parent / "state.json" for name, _ in seen if name.name == "dataset_info.json"}
    no_data = [name for name, _ in seen if name.name in _NO_DATA or name in saved]
    visible = [(name, file) for name, file in seen if name not in no_data]
    found = [(split_of(str(name)), file) for name, file in visible if is_known(file)]
    # Files beside those of a train split belong to none; where there is no such split, they are it.
    rest = "" if any(name == "train" for name, _ in found) else "train"
    known = [(rest if name is None else name, file) for name, file in found]
    others = Counter(
        f"of the split {name}" if name else "of no split" for name, _ in known if name not in (split, elsewhere)
    )
    unread = (name for name, file in visible if not is_known(file))
    others.update(f"{name.name}, the card of a data set" for name in no_data if name.suffix == ".md")
    others.update(f"*{''.join(name.suffixes[-2:]) or name.name}, which is not read" for name in unread)
    said = [f"{count} file{'s' if count > 1 else ''} {what}" for what, count in sorted(others.items())]
    splits = sorted({name for name, _ in known if name})
    return Chosen([file for name, file in known if name == split], splits, ", ".join(said))


def split_of(name: str) -> str | None:
    """The split that a file's path inside its directory names; None where it names none."""
    if found := _SHARD.search(name):
        return found[1]
    for split, words in _WORDS.items():
        if re.search(rf"(?:^|[-._ 0-9/])(?:{'|'.join(words)})(?:[-._ 0-9/]|$)", name):
            return split
    return None


def _is_hidden(name: PurePosixPath) -> bool:
    return any(part.startswith(".") for part in name.parts) or any(part.startswith("__") for part in name.parts[:-1])

"""`python -m tests.pins shards sides losses help` writes the golden values that are named, all of them for `all`.

`python -m tests.pins bits FILE` writes losses, gradient norms and hashes of weights exactly. Run it with two versions
of the code on one machine: the files are equal where the versions compute the same. It takes a minute.
"""

import sys
import tempfile
from pathlib import Path

from tests.pins.golden import write_golden
from tests.pins.helps import HELP, help_texts
from tests.pins.losses import exact_numbers, pinned_losses
from tests.pins.shards import pinned_stores
from tests.pins.sides import pinned_sides

_GOLDEN = ("shards", "sides", "losses", "help")


def _write(name: str, directory: Path) -> None:
    if name == "help":
        HELP.mkdir(exist_ok=True)
        texts = help_texts()
        for path in HELP.glob("*.txt"):
            if path.name not in texts:
                path.unlink()
        for file, text in texts.items():
            (HELP / file).write_text(text, encoding="utf-8")
    elif name == "shards":
        write_golden(name, pinned_stores(directory))
    elif name == "sides":
        write_golden(name, pinned_sides())
    else:
        write_golden(name, pinned_losses(directory))


def main(words: list[str]) -> None:
    is_exact = len(words) == 2 and words[0] == "bits"
    if not is_exact and (not words or set(words) - {*_GOLDEN, "all"}):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as directory:
        if is_exact:
            # Not to standard output, which libraries write to as well.
            Path(words[1]).write_text(exact_numbers(Path(directory)), encoding="utf-8")
            return
        for name in _GOLDEN if "all" in words else words:
            _write(name, Path(directory))


if __name__ == "__main__":
    main(sys.argv[1:])

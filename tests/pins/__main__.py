"""`python -m tests.pins shards sides losses help` writes the golden values that are named, all of them for `all`.

`python -m tests.pins bits` writes nothing: it prints losses, gradient norms and hashes of weights exactly. Run it with
two versions of the code on one machine; the outputs are equal where the versions compute the same.
"""

import sys
import tempfile
from pathlib import Path

from tests.pins.golden import write_golden
from tests.pins.helps import HELP, help_texts
from tests.pins.losses import pinned_losses, print_bits
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


def main(names: list[str]) -> None:
    if unknown := set(names) - {*_GOLDEN, "all", "bits"} or not names:
        sys.exit(f"{__doc__}\nunknown: {unknown}")
    for name in _GOLDEN if "all" in names else names:
        with tempfile.TemporaryDirectory() as directory:
            if name == "bits":
                print_bits(Path(directory))
            else:
                _write(name, Path(directory))


if __name__ == "__main__":
    main(sys.argv[1:])

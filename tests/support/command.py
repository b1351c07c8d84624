"""Runs `clm-dist` in this process, or in one of its own that tells what it loaded."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from clm_dist.cli.app import main


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


def clm_dist(capsys: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Said:
    """Exit code and output of a command."""
    monkeypatch.setattr(sys, "argv", ["clm-dist", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return Said(int(ended.value.code or 0), printed.out, printed.err)


# Loaded, each costs a command a second or more. On its own torch has 766 modules.
HEAVY = {"datasets", "deepspeed", "pandas", "ray", "tokenizers", "torch", "transformers"}
MOST_MODULES = 900
"""Of a command that answers at once; --help loads 736, a prepare that finds its store 678."""
_LOADED = """
import json, sys
from clm_dist.cli.app import main
sys.argv[0] = "clm-dist"
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def modules_of(*arguments: object) -> tuple[str, set[str]]:
    """Standard output of a command that succeeds, and the modules that its process loads."""
    command = [sys.executable, "-c", _LOADED, *map(str, arguments)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return ended.stdout, set(json.loads(ended.stderr.splitlines()[-1]))


def assert_starts_at_once(modules: set[str]) -> None:
    """Check what makes a command quick, which a clock on a busy machine would not show."""
    assert not {name.partition(".")[0] for name in modules} & HEAVY
    assert len(modules) < MOST_MODULES


def cells(out: str, name: str) -> list[str]:
    """The cells of a table's row."""
    (row,) = (line for line in out.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in row.strip("│").split("│")]

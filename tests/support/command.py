"""Runs `clm-dist` in this process."""

import sys
from dataclasses import dataclass
from typing import Any

import pytest

from clm_dist.cli import main


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


def cells(out: str, name: str) -> list[str]:
    """The cells of a table's row."""
    (row,) = (line for line in out.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in row.strip("│").split("│")]

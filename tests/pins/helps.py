"""The text of `--help` of every command."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from clm_dist.cli.app import app
from tests.conftest import ROOT

HELP = ROOT / "tests" / "pins" / "help"
_WIDTH = 100
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def commands() -> list[tuple[str, ...]]:
    """The words of every command: `()`, `("run",)`, `("submit", "slurm")`, ..."""
    return sorted(_walk(typer.main.get_command(app), ()))


def _walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk(inner, (*words, name))


def file_name(words: tuple[str, ...]) -> str:
    """`clm-dist-submit-slurm.txt`"""
    return "-".join(["clm-dist", *words]) + ".txt"


def help_text(words: tuple[str, ...]) -> str:
    """What `clm-dist WORDS --help` prints on a terminal of 100 columns, without colours."""
    with pytest.MonkeyPatch.context() as patched:
        # rich reads both when a command prints; typer reads its own when it is imported.
        patched.setenv("COLUMNS", str(_WIDTH))
        patched.setenv("NO_COLOR", "1")
        patched.setattr("typer.rich_utils.MAX_WIDTH", _WIDTH)
        patched.setattr("typer.rich_utils.FORCE_TERMINAL", None)
        result = CliRunner().invoke(app, [*words, "--help"], prog_name="clm-dist")
    assert result.exit_code == 0, result.output
    # Panels are filled with spaces up to the width.
    lines = [line.rstrip() for line in _COLOURS.sub("", result.stdout).splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


def help_texts() -> dict[str, str]:
    """The help of every command by the name of its golden file."""
    return {file_name(words): help_text(words) for words in commands()}

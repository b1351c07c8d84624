"""What `--help` says; `python -m tests.pins help` writes the texts."""

import pytest

from tests.pins.helps import HELP, commands, file_name, help_text


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(["clm-dist", *words]))
def test_the_help_of_a_command_is_its_golden_text(words: tuple[str, ...]) -> None:
    assert help_text(words) == (HELP / file_name(words)).read_text(encoding="utf-8")


def test_every_golden_text_is_that_of_a_command() -> None:
    assert {path.name for path in HELP.iterdir()} == {file_name(words) for words in commands()}

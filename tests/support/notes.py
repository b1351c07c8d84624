"""A display that a test reads."""

from typing import Any

from clm_dist.progress import Silent


class Notes(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: list[str] = []

    def start(self, stage: str, **about: Any) -> None:
        self.stages.append(stage)

    def note(self, text: str) -> None:
        self.notes.append(text)

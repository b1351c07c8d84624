"""Text in pieces while its ids come."""

from collections.abc import Callable
from typing import Any


class Streamer:
    """Tells the text of one row, piece by piece, to a function; together the pieces are the whole text.

    transformers calls `put` and `end`. Its own TextStreamer decodes each line apart, which is another text where a
    tokenizer drops the space at the begin of a text.
    """

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._ids: list[int] = []
        self._told = ""

    def put(self, ids: Any) -> None:
        """Take the prompt's ids, (1, T), or a new id, (1,)."""
        self._ids += ids.flatten().tolist()
        text = self._text()
        # The bytes of a character may be in several tokens.
        if not text.endswith("\ufffd") and text.startswith(self._told):
            self._tell(text[len(self._told) :])
            self._told = text

    def end(self) -> None:
        text = self._text()
        # Some tokenizers change what is before a token: then the whole text is told once more.
        self._tell(text[len(self._told) :] if text.startswith(self._told) else f"\n{text}")

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

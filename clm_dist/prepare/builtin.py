"""The built-in corpus: Python's own language reference, which ships with Python, one record a topic."""

import hashlib
import re
from functools import cache

import pyarrow as pa

from clm_dist.config.data import DataConfig

_BLANK_LINES = re.compile(r"\n\s*\n")
_ITEM = re.compile(r"^(?:[*•-]|\(?\d+[.)]) ")
# One expression, so that stars inside of a literal mark nothing: "**" is an operator.
_MARKED = re.compile(r'"([^"]+)"|\*\*(\w.*?)\*\*|(?<![\w*])\*(\w[^*"]*)\*(?![\w*])')
_FEWEST_SPACES = 3


@cache
def load_builtin() -> pa.Table:
    """The corpus, with the columns `topic`, `text` as Python has it, and `paragraphs`, the prose of the text."""
    from pydoc_data.topics import topics

    return pa.table(
        {
            "topic": pa.array(topics.keys(), pa.string()),
            "text": pa.array(topics.values(), pa.string()),
            "paragraphs": pa.array([paragraphs_of(text) for text in topics.values()], pa.list_(pa.string())),
        }
    )


def builtin_identity(data: DataConfig) -> dict[str, object]:
    """What stands for the corpus in a store's fingerprint; it differs between versions of Python."""
    texts = load_builtin().column("text").to_pylist()
    identity: dict[str, object] = {"builtin": "pydoc_data.topics", "topics": [len(texts), sum(map(len, texts))]}
    if "paragraphs" in data.text_template.paths:
        # A change of how they are made from the text changes them, too.
        paragraphs = load_builtin().column("paragraphs").to_pylist()
        identity["paragraphs"] = hashlib.sha256(repr(paragraphs).encode()).hexdigest()[:16]
    return identity


def paragraphs_of(text: str) -> list[str]:
    """The paragraphs of prose in a topic, each in one line: no headings, code, grammar or tables.

    Prose begins with a capital letter and ends like a sentence. The marks around literals (`"with"`), emphasis and
    items of lists are removed.
    """
    paragraphs = (_ITEM.sub("", " ".join(block.split())) for block in _BLANK_LINES.split(text))
    prose = (one for one in paragraphs if one[:1].isupper() and one[-1] in ".:;" and one.count(" ") >= _FEWEST_SPACES)
    return [_MARKED.sub(lambda found: found[found.lastindex or 0], one) for one in prose]

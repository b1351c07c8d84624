"""HTML pages from the templates in assets/: one file, which fetches nothing and escapes all text."""

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from clm_dist import __version__

_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Table:
    """The cells of a table."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset()
    """Numbers of the columns that hold text, whose lines may break."""
    note: str = ""


def render_html(template: str, title: str, payload: Mapping[str, Any], **values: Any) -> str:
    """A page.

    Args:
        payload: what page.js draws; no number in it may be NaN or infinite.
        values: of the template.
    """
    library, script = _read("uplot.js"), _read("page.js")
    # No script runs but these two, whatever a text of the run holds.
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in (library, script))
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"
    # No text in it ends the element or begins a comment.
    data = json.dumps(payload, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            policy=Markup(policy),
            styles=Markup(_read("uplot.css") + _read("page.css")),
            library=Markup(library),
            script=Markup(script),
            payload=Markup(data),
            written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            version=__version__,
            **values,
        )
        # A name that is not UTF-8 may be in it.
        .encode("utf-8", "backslashreplace")
        .decode()
    )


@cache
def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(_ASSETS)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

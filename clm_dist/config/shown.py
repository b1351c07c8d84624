"""What a person wrote, as a message shows it."""

_MOST = 200


def shown(text: str, most: int = _MOST) -> str:
    """A text in one line that a terminal prints as it is: control characters are escaped, and a long text is cut."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return plain if len(plain) <= most else f"{plain[:most]}..."


def printable(text: str) -> str:
    """A text as a terminal may print it: control characters but line breaks and tabs are escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)

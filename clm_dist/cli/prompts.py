"""What `generate` reads and writes: prompts, and JSON lines of their texts."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from clm_dist.errors import ConfigError
from clm_dist.files.atomic import writing
from clm_dist.progress import Progress, Silent, err, open_progress

_STANDARD = "-"


def read_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of `--prompt` or `--file`, else of standard input; blank lines of a file are none.

    Raises:
        ConfigError: there is none, or they cannot be read, or both options are given.
    """
    if given and file:
        raise ConfigError("give prompts with --prompt or with --file, not both")
    try:
        if given:
            prompts = given
        else:
            text = sys.stdin.read() if file is None or str(file) == _STANDARD else file.read_text(encoding="utf-8-sig")
            if file is not None and file.suffix == ".jsonl":
                lines = enumerate(text.split("\n"), 1)
                prompts = [_of_json(line, f"{file}:{number}") for number, line in lines if line.strip()]
            else:
                prompts = [line for line in text.split("\n") if line.strip()]
        for prompt in prompts:
            prompt.encode()  # Python accepts bytes that are not text on the command line.
    except OSError as error:
        raise ConfigError(f"cannot read the prompts in {file}: {error.strerror}") from None
    except UnicodeError as error:
        where = f" in {file}" if file else ""
        raise ConfigError(f"the prompts{where} are not UTF-8 text: {error}; convert them, e.g. with iconv") from None
    if not prompts:
        raise ConfigError("there is no prompt; give one with --prompt, a file of them with --file, or standard input")
    return prompts


def _of_json(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ConfigError(f'{where} is not an object with a text "prompt"; write {{"prompt": "Once upon a time"}}')
    return prompt


@contextlib.contextmanager
def open_texts(path: Path) -> Iterator[tuple[Callable[[str, str], None], Progress]]:
    """How to write a prompt and its text as a JSON line, at once, and where to say how far it is.

    Args:
        path: a file that is empty or not there, or `-`.

    Raises:
        ConfigError: the file has lines already, or cannot be written.
        StorageError: the disk is full.
    """
    if str(path) == _STANDARD:
        yield lambda prompt, text: print(_as_json(prompt, text), flush=True), _Notes()
        return
    if path.is_file() and path.stat().st_size:
        raise ConfigError(f"--out {path} has texts already, which are kept; name another file, or remove this one")
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}; name another file") from None
    with writing(path), file, open_progress(err) as progress:
        yield lambda prompt, text: print(_as_json(prompt, text), file=file, flush=True), progress


def say(text: str) -> None:
    """Print a line on standard error."""
    err.print(text, markup=False, soft_wrap=True)


class _Notes(Silent):
    """No live line, which would come between the lines of standard output."""

    def note(self, text: str) -> None:
        say(text)


def _as_json(prompt: str, text: str) -> str:
    return json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False)

"""Local paths that a person wrote."""

import contextlib
from pathlib import Path

from clm_dist.config.shown import shown
from clm_dist.errors import ConfigError, first_line


def local_path(path: str, name: str) -> Path:
    """A local path with its `~` spelled out, whether it is there or not. Raises ConfigError where it cannot be.

    Args:
        name: the option or the field that holds it, for the message.
    """
    try:
        local = Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            local.stat()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"{name} {shown(path, 80)} cannot be used as a path: {reason}; name another") from None
    return local


def local_dir(path: str, option: str) -> Path:
    """An absolute local path. Raises ConfigError for a URL."""
    if "://" in path and not path.startswith("file://"):
        raise ConfigError(f"{option} {path}: only directories that every node sees are supported yet, no URLs")
    return local_path(path.removeprefix("file://"), option).absolute()

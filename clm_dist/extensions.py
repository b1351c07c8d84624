"""What other packages add, by entry points: only what is installed is found, never a file of a run directory."""

import contextlib
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from clm_dist.errors import ConfigError, first_line


def load_extension(group: str, name: str, *, field: str) -> Any:
    """The object that an installed package offers under a name.

    Args:
        group: of entry points, such as `clm_dist.sources`.
        field: of the job that has the name.

    Raises:
        ConfigError: no package offers it, two do, or it cannot be imported.
    """
    with _installed_alone():
        points = entry_points(group=group)
    found = [point for point in points if point.name == name]
    if not found:
        offered = ", ".join(sorted(point.name for point in points)) or "none"
        raise ConfigError(
            f"{field} {name} is offered by no installed package (entry points {group}: {offered}); install the package "
            "that has it in this environment",
            field=field,
        )
    if len({point.value for point in found}) > 1:
        packages = " and ".join(sorted(_package_of(point) for point in found))
        raise ConfigError(f"{field} {name} is offered by {packages}; uninstall one of them", field=field)
    try:
        with _installed_alone():
            return found[0].load()
    except Exception as error:  # whatever its package raises when it is imported
        raise ConfigError(
            f"{field} {name} of {_package_of(found[0])} cannot be loaded ({found[0].value}): {first_line(error)}",
            field=field,
        ) from error


@contextlib.contextmanager
def _installed_alone() -> Iterator[None]:
    """Without the working directory among the places of modules, which `python -m` puts first, and a notebook too."""
    places = list(sys.path)
    if places and (not places[0] or Path(places[0]).resolve() == Path.cwd()):
        del sys.path[0]
    try:
        yield
    finally:
        sys.path[:] = places


def _package_of(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value

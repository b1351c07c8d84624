"""What other packages add, by entry points: only what is installed is found, never a file of a run directory."""

import contextlib
import difflib
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from clm_dist.errors import ConfigError, first_line


def load_extension(group: str, name: str, *, field: str) -> Any:
    """The object that an installed package offers under a name.

    Raises:
        ConfigError: as `find_extension`, or it cannot be imported.
    """
    found = find_extension(group, name, field=field)
    try:
        with _installed_alone():
            return found.load()
    except Exception as error:  # whatever its package raises when it is imported
        raise ConfigError(
            f"{field} {name} of {_package_of(found)} cannot be loaded ({found.value}): {first_line(error)}",
            field=field,
        ) from error


def find_extension(group: str, name: str, *, field: str, built_in: Sequence[str] = ()) -> EntryPoint:
    """The entry point of a name, which is not imported.

    Args:
        group: of entry points, such as `clm_dist.sources`.
        field: of the job that has the name.
        built_in: names that the field takes without a package.

    Raises:
        ConfigError: no package offers it, or two do.
    """
    with _installed_alone():
        points = entry_points(group=group)
    found = [point for point in points if point.name == name]
    if not found:
        names = sorted(point.name for point in points)
        near = difflib.get_close_matches(name, [*built_in, *names], n=1)
        also = f"; built in: {', '.join(built_in)}" if built_in else ""
        raise ConfigError(
            f"{field} {name} is offered by no installed package (entry points {group}: {', '.join(names) or 'none'}"
            f"{also}); {f'did you mean {near[0]}? Else ' if near else ''}install the package that has it in this "
            "environment",
            field=field,
        )
    if len({point.value for point in found}) > 1:
        packages = " and ".join(sorted(_package_of(point) for point in found))
        raise ConfigError(f"{field} {name} is offered by {packages}; uninstall one of them", field=field)
    return found[0]


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

"""Versions of Python and the libraries, against those that clm-dist is tested with, and between nodes."""

import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from clm_dist import __version__
from clm_dist.doctor.finding import Finding, error, ok, on, unchecked, warning

_PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "huggingface_hub",
    "pyarrow",
    "numpy",
    "safetensors",
    "tokenizers",
)
_SAME_EVERYWHERE = ("clm-dist", "Python", "ray", "torch")
"""Ray refuses other versions of Python and of itself; workers with other code compute otherwise, or wait for ever."""
_INSTALL = "pip install --upgrade clm-dist, which brings versions that are tested"


@dataclass(frozen=True)
class Versions:
    """What is installed on a node."""

    python: str
    own: str
    """Of clm-dist."""
    packages: dict[str, str | None]
    """None is not installed."""
    tested: dict[str, str] | None
    """The tested versions of each package, as the installed clm-dist names them; None where it is not installed."""
    tested_python: str = ""


def read_versions() -> Versions:
    packages = {name: _version_of(name) for name in _PACKAGES}
    python = platform.python_version()
    try:
        own = metadata.distribution("clm-dist")
    except metadata.PackageNotFoundError:
        return Versions(python, __version__, packages, None)
    wanted = [Requirement(line) for line in own.requires or ()]
    named = {one.name.replace("-", "_"): str(one.specifier) for one in wanted if one.marker is None}
    tested = {name: named[name] for name in _PACKAGES if name in named}
    return Versions(python, __version__, packages, tested, own.metadata["Requires-Python"] or "")


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def judge_versions(found: Versions) -> Iterator[Finding]:
    """The findings of one node."""
    yield from _missing(found)
    if found.tested is None:
        yield unchecked(
            "versions",
            "the versions of the libraries, because clm-dist is not installed here, only its source is there (pip "
            "install -e . installs it)",
        )
        return
    untested = [
        (name, version, found.tested[name])
        for name, version in found.packages.items()
        if version and name in found.tested and not SpecifierSet(found.tested[name]).contains(version, prereleases=True)
    ]
    for name, version, tested in untested:
        yield warning(
            "versions",
            f"{name} {version} is installed, clm-dist {found.own} is tested with {tested}",
            "a library that has moved what clm-dist uses fails in the middle of a run, or computes otherwise",
            f"pip install '{name}{tested}'",
        )
    if found.tested_python and not SpecifierSet(found.tested_python).contains(found.python, prereleases=True):
        yield warning(
            "versions",
            f"Python {found.python} runs, clm-dist {found.own} needs {found.tested_python}",
            "clm-dist uses what other versions of Python do not have",
            f"make an environment with Python {found.tested_python}",
        )
    if not untested:
        shown = ", ".join(f"{name} {version}" for name, version in list(found.packages.items())[:4] if version)
        yield ok("versions", f"clm-dist {found.own}, Python {found.python}, {shown}, ...: as tested")


def _missing(found: Versions) -> Iterator[Finding]:
    for name, version in found.packages.items():
        if version is None:
            yield error("versions", f"{name} is not installed", "every run needs it", _INSTALL)


def compare_versions(nodes: Mapping[str, Versions]) -> Iterator[Finding]:
    """The findings of what differs between nodes; they name the nodes that have another version than most."""
    if len(nodes) < 2:
        return
    table = {
        node: {"clm-dist": one.own, "Python": one.python.rpartition(".")[0], **one.packages}
        for node, one in nodes.items()
    }
    differing = False
    for name in next(iter(table.values())):
        versions = {node: row.get(name) for node, row in table.items()}
        counts = Counter(versions.values())
        if len(counts) == 1:
            continue
        differing = True
        # Where as many have the one as the other, the first node's is that of most: the driver runs there.
        (common, _), *_ = counts.most_common()
        for node, version in versions.items():
            if version != common:
                make = error if name in _SAME_EVERYWHERE else warning
                found = make(
                    "versions",
                    f"{name} is {version or 'not installed'} here, and {common or 'not installed'} on most nodes",
                    "workers with other versions compute otherwise, wait for each other for ever, or are refused",
                    f"install {name} {common} there too, or start from one environment that all nodes see",
                )
                yield from on(node, [found])
    if not differing:
        yield ok("versions", f"the same on all {len(nodes)} nodes")

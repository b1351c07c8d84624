"""Packages with entry points, as an installer leaves them."""

from pathlib import Path


def install_package(site: Path, module: str, code: str, group: str, **entries: str) -> None:
    """A package of one module.

    Args:
        site: a directory of `sys.path`.
        entries: the object in the module, by the name of its entry point.
    """
    about = site / f"{module}-1.0.dist-info"
    about.mkdir(parents=True)
    (site / f"{module}.py").write_text(code)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    points = "".join(f"{name} = {module}:{entry}\n" for name, entry in entries.items())
    (about / "entry_points.txt").write_text(f"[{group}]\n{points}")

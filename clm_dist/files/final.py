"""The final model of a run: the hashes of its files, and whether they are as they were when the run was done."""

import os

from clm_dist.errors import ConfigError
from clm_dist.files.hashes import HashMemory, changed_files, file_sha256
from clm_dist.files.result import read_result
from clm_dist.files.run_dir import RunDir

CARD = "README.md"
"""The model card, which `run` and `push` write again."""
PICTURE = "loss.png"
"""The picture in the card, written with it."""


def hash_final(run: RunDir) -> dict[str, str]:
    """The sha256 of each file of a run's final model but the card's, by its name in the model's directory.

    The files are on the disk when this returns.
    """
    names = (str(file.relative_to(run.final)) for file in run.final.rglob("*") if file.is_file())
    hashes = {}
    for name in sorted(names):
        if name not in (CARD, PICTURE):
            with (run.final / name).open("rb") as file:
                os.fsync(file.fileno())
            hashes[name] = file_sha256(run.final / name)
    HashMemory(run.hashes).remember({run.final / name: sha256 for name, sha256 in hashes.items()})
    return hashes


def find_damage(run: RunDir, *, read_all: bool = False) -> str | None:
    """What is wrong with the final model of a run that is done; None where nothing is, or the run is not done.

    Of a model that a version without these hashes wrote, only the directory is looked for.

    Args:
        read_all: read files that are as the memory of hashes has them, too.
    """
    result = read_result(run.root) if run.result.exists() else None
    if result is None or result["status"] != "done":
        return None
    if not run.final.is_dir():
        return f"{run.final} is missing"
    problems = changed_files(run.final, result.get("files", {}), None if read_all else HashMemory(run.hashes))
    if not problems:
        return None
    name, problem = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more of its files are missing or changed)" if len(problems) > 1 else ""
    return f"{run.final / name} {problem}{more}"


def check_final(run: RunDir, *, read_all: bool = False) -> None:
    """Raise ConfigError where the final model of a run is not there, or not as it was written; see `find_damage`."""
    again = f"`clm-dist run {run.job} --runs {run.root.parent}`"
    if damage := find_damage(run, read_all=read_all):
        raise ConfigError(f"{damage}; {again} writes the model again from the run's last checkpoint")
    if not run.final.is_dir():
        raise ConfigError(f"the run {run.root} has no final model yet; {again} goes on with it")

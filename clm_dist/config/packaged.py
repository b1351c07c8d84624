"""The job files that are packaged with clm-dist, which a name stands for."""

import difflib
from pathlib import Path

JOBS = Path(__file__).resolve().parent.parent / "jobs"


def packaged_jobs() -> list[str]:
    """Names of the packaged jobs."""
    return sorted(file.stem for file in JOBS.glob("*.yaml"))


def find_job(path: Path, name: str) -> Path:
    """The path if it is that of a file or not the name of a packaged job, else the packaged job's file."""
    return JOBS / f"{name}.yaml" if name in packaged_jobs() and not path.is_file() else path


def describe_packaged(path: Path) -> str:
    """What to name instead of a job file that does not exist, in words: the packaged jobs, the nearest first."""
    near = difflib.get_close_matches(path.stem, packaged_jobs(), n=1)
    question = f"did you mean {near[0]}? " if near else ""
    return f"{question}The packaged jobs are {', '.join(packaged_jobs())}; `clm-dist init` writes a job file"

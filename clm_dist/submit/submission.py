"""A submission to any cluster: its name, its runs, and where its files lie.

    <runs>/.submitted/NAME/submission.json   what was submitted, and the number it got
                           script            as it was submitted
                           job.yaml          the resolved job, which the script runs
                           log               the driver's, over all attempts
                           nodes/HOST.log    what the host's Ray did; nodes/HOST/ATTEMPT/ holds Ray's own logs
                           token, attempt    Ray's token, and the number of the attempt that runs

Each run of a sweep has the files from job.yaml on in a directory of its own, `NAME/0`, `NAME/1`, ... On Kubernetes
only `submission.json` and `job.yaml` lie here; the runs and the other files lie on the claim.
"""

import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from clm_dist.config.schema import field_names
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import damaged, read_json, write_json

_DIRECTORY = ".submitted"


def submitted_dir(runs: Path | str, name: str) -> Path:
    """The directory of a submission's files."""
    return Path(runs) / _DIRECTORY / name


@dataclass(frozen=True)
class RunFiles:
    """The files of one run of a submission."""

    root: Path

    @property
    def job(self) -> Path:
        return self.root / "job.yaml"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def nodes(self) -> Path:
        return self.root / "nodes"


@dataclass(frozen=True)
class Place:
    """The cluster and the namespace of a job on Kubernetes."""

    namespace: str
    context: str | None = None
    """Context of kubectl; None if it has none, as in a pod."""
    plain: bool = False
    """Whether it is a Job instead of a RayJob."""


@dataclass(frozen=True)
class Submission:
    """A job, or a sweep of jobs, that was submitted to a cluster."""

    name: str
    backend: Literal["slurm", "k8s"]
    runs: Path
    """Directory of the runs."""
    run_names: tuple[str, ...]
    sweep: bool = False
    job_id: str | None = None
    prepare_id: str | None = None
    """The job that prepares first."""
    k8s: Place | None = None
    """Set for the backend k8s."""
    submitted: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def root(self) -> Path:
        return submitted_dir(self.runs, self.name)

    @property
    def script(self) -> Path:
        return self.root / "script"

    def files(self, task: int) -> RunFiles:
        """The files of one of its runs."""
        return RunFiles(self.root / str(task) if self.sweep else self.root)

    def task_id(self, task: int) -> str:
        """The cluster's number of one of its runs."""
        return f"{self.job_id}_{task}" if self.sweep else str(self.job_id)

    def write(self) -> None:
        write_json(self.root / "submission.json", asdict(self) | {"runs": str(self.runs)}, private=True)

    @classmethod
    def read(cls, root: Path) -> "Submission":
        """Raises ConfigError where the file is damaged."""
        path = root / "submission.json"
        values = read_json(path)
        try:
            # The runs may have been moved.
            names = tuple(values["run_names"])
            place = Place(**values["k8s"]) if values.get("k8s") else None
            return cls(**values | {"runs": root.parent.parent, "run_names": names, "k8s": place})
        except (TypeError, KeyError) as error:
            raise damaged(path, f"{error!r}") from None


def submissions(runs: Path) -> list[Submission]:
    """All submissions with this directory of runs, the newest first."""
    found = [Submission.read(path.parent) for path in (runs / _DIRECTORY).glob("*/submission.json")]
    return sorted((one for one in found if one.job_id), key=lambda one: one.submitted, reverse=True)


def find_submission(runs: Path, which: str | None) -> tuple[Submission, int | None]:
    """Like `seek_submission`. Raises ConfigError where there is none."""
    found = submissions(runs)
    if sought := seek_submission(found, which):
        return sought
    where = f"from {runs}; --runs names another directory"
    if which is None:
        raise ConfigError(f"nothing was submitted {where}, and `clm-dist submit slurm|k8s JOB` submits")
    names = ", ".join(one.name for one in found[:8])
    raise ConfigError(f"no submission {which} {where}" + (f" (there: {names})" if names else ""))


def seek_submission(found: Sequence[Submission], which: str | None) -> tuple[Submission, int | None] | None:
    """The submission of a name or a job's number, or the last one for None; and which run of a sweep it names, if any.

    Args:
        found: the newest first.
    """
    if which is None and found:
        return found[0], None
    for one in found:
        if which in (one.name, one.job_id, one.prepare_id):
            return one, None
        for task, name in enumerate(one.run_names):
            if which in (name, one.task_id(task)):
                return one, task
    return None


def sweep_settings(sweeps: Sequence[str]) -> list[list[str]]:
    """The settings of each run of a sweep: `["learning_rate=1e-5,2e-5"]` is
    `[["train.learning_rate=1e-5"], ["train.learning_rate=2e-5"]]`; of several, every combination.

    Raises:
        ConfigError: it names no field or several, or has no values.
    """
    choices = []
    for sweep in sweeps:
        name, equals, values = sweep.partition("=")
        if not equals or not all(value.strip() for value in values.split(",")):
            raise ConfigError(f"--array {sweep}: write it as field=value,value, e.g. learning_rate=1e-5,2e-5")
        dotted = _field_of(name, sweep)
        choices.append([f"{dotted}={value.strip()}" for value in values.split(",")])
    return [list(settings) for settings in itertools.product(*choices)]


def sweep_name(name: str, settings: Sequence[str]) -> str:
    """The name of a run of a sweep: `eli5-learning_rate-1e-5`."""
    pairs = [setting.partition("=") for setting in settings]
    labels = [f"{dotted.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9._-]+', '-', value)}" for dotted, _, value in pairs]
    return "-".join([name, *labels])


def _field_of(name: str, sweep: str) -> str:
    """A field's dotted name, from the whole name or from its last part."""
    if "." in name:
        return name
    fields = [f for f in field_names() if f.rpartition(".")[2] == name]
    if len(fields) != 1:
        problem = f"could be {', '.join(fields)}; write one of them" if fields else "is not a field of a job"
        raise ConfigError(f"--array {sweep}: {name} {problem}")
    return fields[0]

"""The Python interface, which `import clm_dist` offers: the commands as functions, and a run as an object.

    import clm_dist

    job = clm_dist.load_job("quickstart", "train.epochs=2")
    run = clm_dist.run(job)
    run.metrics()                       # a pandas DataFrame
    clm_dist.evaluate(run, files="answers.jsonl", category="topic").figures

What goes wrong is raised as in `clm_dist.errors`. Torch and Ray are loaded by the functions that need them.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clm_dist.config import load
from clm_dist.config.job import JobConfig
from clm_dist.config.paths import local_dir
from clm_dist.errors import ConfigError
from clm_dist.files.final import check_final
from clm_dist.files.records import read_records
from clm_dist.files.result import Result
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import DEFAULT_STORES, Stores
from clm_dist.progress import err, nowhere, open_progress

if TYPE_CHECKING:
    import pandas as pd

    from clm_dist.evaluation import Evaluated

PathLike = str | os.PathLike[str]


class Run:
    """A run directory: one that is done, stopped or failed, or one that is being trained."""

    def __init__(self, path: PathLike) -> None:
        """Raises ConfigError where a path is no run directory."""
        self.path = Path(path).expanduser().absolute()
        self._directory = RunDir(self.path)
        if not self._directory.exists():
            raise ConfigError(
                f"{path} is no run directory; name one that `clm-dist run` wrote, such as runs/quickstart"
            )

    def __repr__(self) -> str:
        return f"clm_dist.Run({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def job(self) -> JobConfig:
        """The job that it was started with last, all defaults filled in."""
        return load.read_saved_job(self._directory.job)

    @property
    def result(self) -> Result:
        """The content of result.json; of a run that has not ended, the figures until now, and `running` as its status.

        Raises:
            ConfigError: no worker has begun to train yet, or a file is damaged.
        """
        from clm_dist.report.live import read_progress

        return read_progress(self.path)

    def metrics(self, kind: str = "step") -> "pd.DataFrame":
        """The records of a kind, one a row, in their order: `step`, `eval`, `checkpoint`, `start`, `failure`, ...

        `files/record_types.py` has the fields of each. Also while the run is trained.
        """
        import pandas as pd

        return pd.DataFrame([record for record in read_records(self._directory.metrics) if record["kind"] == kind])

    def model(self) -> Any:
        """The final model, a transformers `PreTrainedModel` in fp32. Raises ConfigError where there is none yet."""
        from clm_dist.pretrained.weights import load_pretrained

        check_final(self._directory)
        return load_pretrained(str(self._directory.final))

    def tokenizer(self) -> Any:
        """The final model's tokenizer. Raises ConfigError where there is none yet."""
        from clm_dist.pretrained.tokenizer import load_tokenizer

        check_final(self._directory)
        return load_tokenizer(self._directory.final)

    def report(self) -> Path:
        """Write `report.html`, also of a run that goes on, and return its path. Raises ConfigError, see `result`."""
        from clm_dist.report.page import write_page

        write_page(self._directory, self.result)
        return self._directory.report


def load_job(job: PathLike | Mapping[str, Any], *overrides: str) -> JobConfig:
    """A checked job.

    Args:
        job: a job file, the name of a packaged one, or values nested as in a job file without `extends`.
        overrides: `section.field=value` each, as after `--set`.

    Raises:
        ConfigError: a file, a key or a value is wrong; the message names it.
    """
    if isinstance(job, Mapping):
        return load.make_job(job, overrides, path=Path("job")).config
    if not isinstance(job, str | os.PathLike):
        raise ConfigError(f"a job is a file, a name or a mapping, not {type(job).__name__}")
    return load.load_job(Path(job), overrides).config


def prepare(job: JobConfig, *, stores: PathLike | None = None, quiet: bool = False) -> Path:
    """Make the blocks of a job, or find those that are there. Return the store's directory.

    Args:
        stores: directory or URL of the stores; None takes `CLM_DIST_STORE`, or the user's cache.
        quiet: show nothing.
    """
    from clm_dist.prepare import pipeline

    _check_job(job)
    with open_progress(nowhere if quiet else err) as progress:
        return pipeline.prepare(job, _open_stores(stores), progress).local


def run(
    job: JobConfig,
    *,
    runs: PathLike | None = None,
    stores: PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Run:
    """Prepare, train, evaluate and report, and push if the job says so: what `clm-dist run` does, here.

    Called again, it goes on from the last checkpoint of the run of this name, or finds that it is done. A signal that
    asks to stop ends it with a checkpoint, and then `result["status"]` of the run is `preempted`.

    Args:
        runs: directory of the runs; None takes `CLM_DIST_RUNS`, or `runs`.
        stores: see `prepare`.
        resume: go on though the job has changed since.
        overwrite: remove the run of this name and start again.
        quiet: show nothing; what is not pushed is still said.

    Raises:
        ClmDistError: see the classes in `clm_dist.errors`.
    """
    from clm_dist.run import run_job

    _check_job(job)
    directory = local_dir(os.fspath(runs or os.environ.get("CLM_DIST_RUNS") or "runs"), "runs")
    run_job(job, directory, _open_stores(stores), resume=resume, overwrite=overwrite, only_train=False, quiet=quiet)
    return Run(directory / job.name)


def evaluate(
    model: "PathLike | Run",
    *,
    job: PathLike | None = None,
    overrides: Sequence[str] = (),
    files: PathLike | Sequence[PathLike] | None = None,
    blocks: PathLike | None = None,
    category: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    num_processes: int = 1,
    stores: PathLike | None = None,
    quiet: bool = False,
) -> "Evaluated":
    """The figures of a model, on the eval split of its run, on that of a job, on a store or on files.

    Args:
        model: a run, a directory or a Hub id.
        overrides, files, blocks, category, context, stride, num_processes: see `evaluation.evaluate_model`.
    """
    from clm_dist.evaluation import evaluate_model

    named = [files] if isinstance(files, str | os.PathLike) else files or ()
    with open_progress(nowhere if quiet else err) as progress:
        return evaluate_model(
            os.fspath(model),
            _open_stores(stores),
            progress,
            job_file=None if job is None else Path(job),
            overrides=overrides,
            files=[os.fspath(file) for file in named],
            blocks=None if blocks is None else Path(blocks),
            category=category,
            context=context,
            stride=stride,
            num_processes=num_processes,
        )


def _check_job(job: object) -> None:
    if not isinstance(job, JobConfig):
        raise ConfigError(f"a job is what clm_dist.load_job returns, not {type(job).__name__}")


def _open_stores(path: PathLike | None) -> Stores:
    return Stores.at(os.fspath(path or os.environ.get("CLM_DIST_STORE") or DEFAULT_STORES), DEFAULT_STORES)

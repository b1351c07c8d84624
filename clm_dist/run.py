"""A run: the stages one after the other, imported when they begin, because that takes seconds.

Called, this module is `interface.run`.
"""

import contextlib
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from clm_dist import make_callable
from clm_dist.against_plan import compare_with_plan
from clm_dist.config.job import JobConfig
from clm_dist.doctor.finding import one_line
from clm_dist.doctor.quick import examine_quickly
from clm_dist.errors import ClmDistError, ConfigError, TryAgainError, first_line
from clm_dist.files.records import read_records
from clm_dist.files.result import Result, read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.files.runs import find_run
from clm_dist.files.stores import Store, Stores
from clm_dist.progress import Progress, err, nowhere, open_progress, out
from clm_dist.samples import keep_samples, show_samples

if TYPE_CHECKING:
    from clm_dist.prepare.pipeline import Resolved

logger = logging.getLogger(__name__)
make_callable(__name__)


def run_job(
    config: JobConfig,
    runs: Path,
    stores: Stores,
    *,
    resume: bool,
    overwrite: bool,
    only_train: bool,
    quiet: bool = False,
) -> Result:
    """Prepare, train, report, and push if the job says so. Return the run's result.

    Args:
        only_train: take blocks that are prepared already, and show no samples.
        quiet: show nothing but that a model is not pushed.

    Raises:
        ClmDistError: see the stages; what is wrong with the job is said before a worker is started.
    """
    with open_progress(nowhere if quiet else err) as progress:
        directory, done = find_run(config, runs, resume=resume, overwrite=overwrite)
        if done:
            from clm_dist.prepare import pipeline

            progress.note(f"The run {directory.root} is done; --overwrite starts it again")
            result = read_result(directory.root)
            # Data that is away by now says nothing.
            with contextlib.suppress(ClmDistError):
                if pipeline.resolve(config, stores).store.fingerprint != result["data"]:
                    progress.note(
                        "The data or the tokenizer has changed since, or how clm-dist reads them: these are the "
                        "figures of the old. --overwrite trains on the new in place of this run, --set name=... apart"
                    )
        else:
            result = _train(config, directory, stores, progress, overwrite=overwrite, only_train=only_train)
            if result["status"] == "done" and not only_train:
                keep_samples(config, directory, progress)
    if result["status"] == "done":
        progress.times.begin("end")
        shown = nowhere if quiet else out
        _conclude(config, directory, result, shown, with_samples=not only_train)
        if not done:
            shown.print(f"time:   {progress.times.describe()}")
    return result


def _train(
    config: JobConfig, directory: RunDir, stores: Stores, progress: Progress, *, overwrite: bool, only_train: bool
) -> Result:
    """Check, prepare and train a job."""
    for finding in examine_quickly(config, directory.root.parent, stores):
        progress.note(one_line(finding))
    progress.start("Loading torch, transformers and Ray")
    from clm_dist.prepare import pipeline
    from clm_dist.report.live import LivePage

    # All of Ray before its thread: two threads that import parts of one library may get in each other's way.
    from clm_dist.train.ray import driver
    from clm_dist.train.ray.cluster import starting_ray

    progress.start("Checking the job")
    with starting_ray(config.cluster, directory.ray_logs) as started_ray:
        resolved = _resolve(config, stores, progress)
        if only_train and not resolved.store.fetch():
            raise ConfigError("the job's blocks are not prepared yet; run `clm-dist prepare` with this job first")
        progress.start("Starting Ray")
        cluster = started_ray()
        store = pipeline.prepare_resolved(resolved, progress)
        with ThreadPoolExecutor(max_workers=1) as pushing:

            def push_epoch(path: Path, step: int) -> None:
                pushing.submit(_push_epoch, config, directory, store, path, step, progress)

            page = LivePage(directory, progress.note)
            try:
                result = driver.train(
                    config,
                    directory,
                    store,
                    cluster,
                    progress,
                    overwrite=overwrite,
                    on_export=push_epoch,
                    on_records=page.look,
                )
            except ClmDistError:
                page.finish()
                raise
            if result["status"] != "done":
                page.finish()
            if config.hub.push == "epoch":
                progress.start("Waiting for the pushes of epochs", kind="end")
        progress.start("Closing Ray", kind="end")
        return result


def _resolve(config: JobConfig, stores: Stores, progress: Progress) -> "Resolved":
    """Check all of a job that needs no worker, and find what its blocks are made from."""
    from clm_dist import hub
    from clm_dist.prepare import pipeline
    from clm_dist.pretrained.tokenizer import load_tokenizer
    from clm_dist.report.card import render_front_matter
    from clm_dist.train.model import check_model, check_tokenizer, load_config
    from clm_dist.train.optimizers import check_optimizer
    from clm_dist.train.trackers.check import check_trackers
    from clm_dist.train.unused import describe_unused, find_unused, trainable_shapes

    if config.hub.push != "never":
        hub.check_access(config)
        hub.check_card(render_front_matter(config))
    check_model(config)
    check_trackers(config.tracking)
    resolved = pipeline.resolve(config, stores)
    if resolved.tokenizer is not None:
        check_tokenizer(config, load_tokenizer(resolved.tokenizer))
    model = load_config(config)
    if unused := find_unused(model, config.data.block_size):
        progress.note(describe_unused(unused))
    if config.train.optimizer != "adamw":
        check_optimizer(config.train, config.cluster.strategy, trainable_shapes(model, unused))
    return resolved


def _conclude(job: JobConfig, directory: RunDir, result: Result, shown: Console, *, with_samples: bool) -> None:
    """Report a run that is done, push it if its job says so, and show what its models write."""
    from clm_dist import hub
    from clm_dist.report.card import write_card
    from clm_dist.report.history import History
    from clm_dist.report.page import write_page
    from clm_dist.report.planned import plan_table
    from clm_dist.report.table import result_table

    history = History.of(read_records(directory.metrics))
    write_page(directory, result, history=history)
    repo = None if job.hub.push == "never" else hub.find_repo(job)
    write_card(directory.final, directory, job, result, repo=repo)
    shown.print(result_table(result))
    if (beside_plan := compare_with_plan(directory, history)) is not None:
        shown.print(plan_table(beside_plan))
    steps = result["train"]["steps"]
    if job.hub.push != "never":
        try:
            if url := hub.pushed_url(job, directory, steps):
                shown.print(f"already pushed to {url}", soft_wrap=True)
            else:
                shown.print(f"pushed to {hub.push(job, directory, directory.final, steps)}", soft_wrap=True)
            shutil.rmtree(directory.exports, ignore_errors=True)
        except (ConfigError, TryAgainError) as error:
            err.print(
                f"not pushed: {error}\nThe model is whole in {directory.final}; push it later with "
                f"`clm-dist push {directory.root}`",
                style="yellow",
                markup=False,
                soft_wrap=True,
            )
    if with_samples:
        show_samples(directory, shown)
    shown.print(f"model:  {directory.final}\nreport: {directory.report}", soft_wrap=True)


def _push_epoch(job: JobConfig, directory: RunDir, store: Store, path: Path, step: int, progress: Progress) -> None:
    """Push an epoch's model; a failure does not stop training, and the next push supersedes it."""
    from clm_dist import hub
    from clm_dist.files.result import build_result
    from clm_dist.report.card import write_card

    try:
        result = build_result(job, directory, store.manifest(), "running")
        write_card(path, directory, job, result, repo=hub.find_repo(job))
        url = hub.push(job, directory, path, step)
    except Exception as error:  # whatever it is: an exception in a thread of the pool is never read
        if not isinstance(error, ClmDistError):
            logger.warning("the push of step %d failed", step, exc_info=error)
        progress.note(f"The model of step {step} is not pushed: {first_line(error)}")
        return
    progress.note(f"Pushed the model of step {step} to {url}")
    shutil.rmtree(path, ignore_errors=True)

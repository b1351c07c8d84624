"""The command `submit k8s`."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from clm_dist.cli.cluster import DryRun, PlanOn, settings_of, submit_to
from clm_dist.cli.options import DEFAULT_RUNS, JobFile, Overrides, Overwrite, Resume, open_stores
from clm_dist.cli.plan import plan_for_hosts
from clm_dist.config.load import load_job, located
from clm_dist.config.paths import local_dir
from clm_dist.errors import ConfigError
from clm_dist.files.stores import DEFAULT_STORES
from clm_dist.submit.k8s.backend import K8sBackend, Launch
from clm_dist.submit.k8s.request import Request
from clm_dist.submit.k8s.sync import pack


def _refuse_workers(count: str | None) -> None:
    if count is not None:
        raise ConfigError(
            f"--workers does not exist any more, because workers are Ray Train's; write --pods {count} for the number "
            f"of pods, or --set cluster.workers={count} for the number of workers"
        )


def _refuse_gpus_per_worker(count: str | None) -> None:
    if count is not None:
        raise ConfigError(
            f"--gpus-per-worker does not exist any more, because a pod may have several workers; write --gpus-per-pod "
            f"{count}"
        )


def k8s(
    job_file: JobFile,
    overrides: Overrides = None,
    runs: Annotated[
        str, typer.Option("--runs", envvar="CLM_DIST_RUNS", help="Directory in which the submission is remembered.")
    ] = DEFAULT_RUNS,
    store: Annotated[
        str | None,
        typer.Option("--store", metavar="URL", help="URL of the prepared blocks (s3://, gs://), instead of the claim."),
    ] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", show_default="that of kubectl's context")] = None,
    pods: Annotated[int | None, typer.Option("--pods", help="Pods with workers.")] = None,
    gpus_per_pod: Annotated[int | None, typer.Option("--gpus-per-pod", help="GPUs of each of them.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="Image in which clm-dist is installed.")] = None,
    claim: Annotated[str | None, typer.Option("--claim", help="PersistentVolumeClaim for runs and blocks.")] = None,
    secret: Annotated[
        str | None, typer.Option("--secret", help="Secret whose keys, such as HF_TOKEN, become variables of the pods.")
    ] = None,
    queue: Annotated[str | None, typer.Option("--queue", help="Queue of Kueue that starts the job.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Submit a Job, not a RayJob, to a cluster without KubeRay.")
    ] = False,
    sync: Annotated[
        bool, typer.Option("--sync", help="Run the code of this clone of clm_dist instead of the image's.")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    plan: PlanOn = None,
    dry_run: DryRun = False,
    _workers: Annotated[str | None, typer.Option("--workers", hidden=True, callback=_refuse_workers)] = None,
    _gpus_per_worker: Annotated[
        str | None, typer.Option("--gpus-per-worker", hidden=True, callback=_refuse_gpus_per_worker)
    ] = None,
) -> None:
    """Submit a job to Kubernetes: prepare, train, evaluate and report in its pods."""
    if store is not None and "://" not in store:
        raise ConfigError(
            f"--store {store} is a directory of this machine, which pods do not see; give a URL (s3://, gs://), or a "
            "directory in the pods with --set cluster.k8s.store=..."
        )
    options = {
        "namespace": namespace,
        "pods": pods,
        "gpus_per_pod": gpus_per_pod,
        "image": image,
        "claim": claim,
        "secret": secret,
        "store": store,
        "queue": queue,
    }
    job = load_job(job_file, [*(overrides or ()), *settings_of("cluster.k8s", options)])
    request = Request(
        resume=resume,
        overwrite=overwrite,
        # A dry run prints the same text every time.
        number="1" if dry_run else str(time.time_ns() // 1_000_000),
        plain=plain,
        code=pack(Path.cwd()) if sync else None,
    )
    launch = Launch(job.config, request, local_dir(runs, "--runs"))
    if plan is not None:
        pods_of = job.config.cluster.k8s
        with located(job):
            stores = open_stores(DEFAULT_STORES)
            (made,) = plan_for_hosts([job.config], stores, plan, nodes=pods_of.pods, gpus_per_node=pods_of.gpus_per_pod)
        launch = replace(launch, plan=made)
    submit_to(K8sBackend(), launch, job, dry_run=dry_run)

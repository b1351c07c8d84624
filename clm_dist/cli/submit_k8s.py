"""The command `submit k8s`."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from clm_dist.cli.options import DEFAULT_RUNS, JobFile, Overrides, Overwrite, Resume, located
from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job
from clm_dist.config.paths import local_dir
from clm_dist.errors import ConfigError
from clm_dist.progress import err, out
from clm_dist.submit.k8s import backend as k8s_launch
from clm_dist.submit.k8s.checks import claim_warning
from clm_dist.submit.k8s.kubectl import Kubectl
from clm_dist.submit.k8s.render import check_job, render
from clm_dist.submit.k8s.request import Request, hosts_of, token_secret
from clm_dist.submit.k8s.sync import pack
from clm_dist.submit.launch import check_name
from clm_dist.submit.submission import Place, Submission


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
        str | None, typer.Option("--store", metavar="URL", help="Prepared blocks (s3://, gs://), not on the claim.")
    ] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", show_default="that of kubectl's context")] = None,
    pods: Annotated[int | None, typer.Option("--pods", help="Pods with workers.")] = None,
    gpus_per_pod: Annotated[int | None, typer.Option("--gpus-per-pod", help="GPUs of each of them.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="Image in which clm-dist is installed.")] = None,
    claim: Annotated[str | None, typer.Option("--claim", help="PersistentVolumeClaim for runs and blocks.")] = None,
    secret: Annotated[
        str | None, typer.Option("--secret", help="Secret whose keys, such as HF_TOKEN, the pods have.")
    ] = None,
    queue: Annotated[str | None, typer.Option("--queue", help="Queue of Kueue that starts the job.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="A Job instead of a RayJob, where KubeRay is not.")] = False,
    sync: Annotated[
        bool, typer.Option("--sync", help="Run the code of this clone of clm_dist, and not that of the image.")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the objects, and ask nobody.")] = False,
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
    given = {
        "namespace": namespace,
        "pods": pods,
        "gpus_per_pod": gpus_per_pod,
        "image": image,
        "claim": claim,
        "secret": secret,
        "store": store,
        "queue": queue,
    }
    settings = [f"cluster.k8s.{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    job = load_job(job_file, [*(overrides or ()), *settings])
    code = pack(Path.cwd()) if sync else None
    request = Request(resume=resume, overwrite=overwrite, plain=plain, code=code)
    if not dry_run:
        request = replace(request, number=str(time.time_ns() // 1_000_000))
    with located(job):
        check_job(job.config, request)
        if dry_run:
            typer.echo(render(job.config, request), nl=False)
            if plain:
                err.print(f"besides, `submit` makes the Secret {token_secret(job.config.name)} with a random key")
            return
        launch = _launch(job.config, request, local_dir(runs, "--runs"))
        k8s_launch.check_submission(launch)
        check_name(launch.submission)
    for warning in filter(None, [*_warnings(job.config), claim_warning(launch.kubectl, job.config)]):
        err.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    if ending := k8s_launch.pods_that_end(launch):
        names = ", ".join(pod["metadata"]["name"] for pod in ending)
        err.print(f"waiting for pods of the last submission, which may still save: {names}", soft_wrap=True)
    submitted = k8s_launch.submit(launch)
    name = submitted.name
    out.print(f"submitted {name} as {submitted.job_id} in the namespace {launch.kubectl.namespace}", soft_wrap=True)
    out.print(f"clm-dist status {name} · clm-dist logs -f {name} · clm-dist cancel {name}")


def _launch(job: JobConfig, request: Request, runs: Path) -> k8s_launch.Launch:
    kubectl = Kubectl.here(job.cluster.k8s.namespace)
    submission = Submission(
        name=job.name,
        backend="k8s",
        runs=runs,
        run_names=(job.name,),
        job_id=f"{'job' if request.plain else 'rayjob'}/{job.name}",
        k8s=Place(kubectl.namespace, kubectl.context, request.plain),
    )
    return k8s_launch.Launch(job, request, submission, kubectl)


def _warnings(job: JobConfig) -> Iterator[str]:
    yield from hosts_of(job.cluster).warnings()
    mount = job.cluster.k8s.mount
    paths = job.data.path if isinstance(job.data.path, list) else [job.data.path]
    places = [("data.path", path) for path in paths if path and job.data.source == "files"]
    places += [("checkpoint.path", job.checkpoint.path)] if job.checkpoint.path else []
    for field, path in (("model.path", job.model.path), ("tokenizer.path", job.tokenizer.path)):
        places += [(field, path)] if path and Path(path).is_dir() else []  # and no id of the Hub
    for field, path in places:
        if "://" not in path and not Path(path).is_relative_to(mount):
            yield (
                f"{field} {path} is a path of this machine, and pods see the claim alone, at {mount}; copy it there, "
                "or name a URL"
            )

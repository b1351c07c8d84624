"""Submit to Kubernetes, watch and cancel."""

import base64
import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from clm_dist.config.job import JobConfig
from clm_dist.config.load import job_text
from clm_dist.errors import ConfigError, SubmitError
from clm_dist.files.atomic import make_dir, write_text
from clm_dist.files.plan_file import PlanFile
from clm_dist.submit.in_pod.pod import PLAN
from clm_dist.submit.k8s import made, render, states
from clm_dist.submit.k8s.checks import check_cluster, claim_warning
from clm_dist.submit.k8s.kubectl import ForbiddenError, Kubectl
from clm_dist.submit.k8s.logs import PodLogs
from clm_dist.submit.k8s.request import Object, Request, hosts_of, selector, token_secret
from clm_dist.submit.states import RunState, Status
from clm_dist.submit.submission import Place, Submission
from clm_dist.submit.training import Training

_LAST_LINES = 200


@dataclass(frozen=True)
class Launch:
    """A job, and where it is remembered."""

    job: JobConfig
    request: Request
    runs: Path
    plan: PlanFile | None = None
    """Plan of the job, if one was asked for; a dry run does not print it."""

    @cached_property
    def kubectl(self) -> Kubectl:
        """kubectl in the namespace of the job. Raises SubmitError if there is no kubectl."""
        return Kubectl.here(self.job.cluster.k8s.namespace)

    @cached_property
    def submission(self) -> Submission:
        """What is remembered of it. Asks kubectl for its context."""
        return Submission(
            name=self.job.name,
            backend="k8s",
            runs=self.runs,
            run_names=(self.job.name,),
            job_id=f"{'job' if self.request.plain else 'rayjob'}/{self.job.name}",
            k8s=Place(self.kubectl.namespace, self.kubectl.context, self.request.plain),
        )

    @property
    def objects(self) -> list[Object]:
        """What is applied, the job itself last."""
        objects = render.objects(self.job, self.request)
        if self.plan is not None:
            (config_map,) = (made for made in objects if made["kind"] == "ConfigMap")
            config_map["data"][PLAN] = json.dumps(self.plan, allow_nan=False)
        if self.request.plain:
            objects.insert(0, _token(self.job.name))
        return objects


class K8sBackend:
    """Kubernetes, by kubectl: a RayJob or an Indexed Job, with what these need."""

    def render(self, launch: Launch) -> str:
        render.check_job(launch.job, launch.request)
        text = render.render(launch.job, launch.request)
        if launch.request.plain:
            text = f"# `submit` also makes the Secret {token_secret(launch.job.name)} with a random key.\n{text}"
        return text

    def check(self, launch: Launch) -> None:
        kubectl, name = launch.kubectl, launch.job.name
        objects = launch.objects
        check_cluster(kubectl, launch.job, launch.request, objects)
        jobs = made.jobs_named(kubectl, name)
        for found in [*jobs, *made.others_named(kubectl, launch.submission)]:
            if not made.is_ours(found, name):
                what = f"{found['kind']} {found['metadata']['name']} in {kubectl.namespace}"
                raise ConfigError(
                    f"there is a {what} that clm-dist did not make, and does not change; make another run with "
                    "--set name=..., or use another namespace with --namespace",
                    field="name",
                )
        for found in filter(made.is_active, jobs):
            kind = found["kind"].lower()
            raise ConfigError(
                f"{name} is queued or running already, as {kind}/{name} in the namespace {kubectl.namespace}, and was "
                f"submitted from elsewhere; end it with `kubectl delete {kind} {name} --namespace={kubectl.namespace}`"
                ", or make another run with --set name=...",
                field="name",
            )
        *others, job = objects
        if any(found["kind"] == job["kind"] for found in jobs):
            # A job that has ended cannot become the new one, and is deleted only after the server accepts that.
            job = {**job, "metadata": {**job["metadata"], "name": f"check-{secrets.token_hex(4)}"}}
        try:
            kubectl.apply([*others, job], dry_run=True)
        except SubmitError as error:
            if "unknown field" not in str(error) or launch.request.plain:
                raise
            raise SubmitError(
                "the cluster does not take the RayJob; its KubeRay operator may be older than 1.6, which lacks fields; "
                f"update it, or submit with --plain\n{error}"
            ) from None

    def warnings(self, launch: Launch) -> Iterator[str]:
        yield from hosts_of(launch.job.cluster).warnings()
        yield from _unseen_paths(launch.job)
        if warning := claim_warning(launch.kubectl, launch.job):
            yield warning
        if ending := made.pods_that_end(launch.kubectl, launch.job.name):
            names = ", ".join(pod["metadata"]["name"] for pod in ending)
            yield f"pods of the last submission may still save, and submit waits for their end: {names}"

    def submit(self, launch: Launch) -> Submission:
        kubectl, submission = launch.kubectl, launch.submission
        make_dir(submission.root, private=True)
        write_text(submission.files(0).job, job_text(launch.job), private=True)
        for found in made.jobs_named(kubectl, submission.name):
            made.delete_and_wait(kubectl, found)
        made.wait_for_pods(kubectl, submission.name)
        names = made.names_of(submission)
        try:
            kubectl.apply(launch.objects)
            submitted = replace(submission, submitted=time.time())
            submitted.write()
        except BaseException as error:  # also Ctrl-C: the objects would be orphaned
            try:
                kubectl.delete(*names)
            except SubmitError as second:
                raise SubmitError(
                    f"{error}\nwhat was made may still be there ({', '.join(names)}): {second}"
                ) from error
            raise
        return submitted

    def describe(self, submission: Submission) -> str:
        return f"{submission.job_id} in the namespace {Kubectl.of(submission).namespace}"

    def status(self, submission: Submission) -> Status:
        kubectl = Kubectl.of(submission)
        found = _find(kubectl, submission)
        job = states.job_state(found)
        training = None
        driver = states.driver_pod(found.pods)
        if driver is not None:
            with contextlib.suppress(SubmitError):  # it has not started, or is gone
                training = Training.of_lines(kubectl.last_lines(driver["metadata"]["name"], _LAST_LINES))
        result = {"status": "done"} if job.state == "DONE" else None
        planned = training.planned if training else None
        return Status([RunState(submission.name, str(submission.job_id), job, training, result, planned)])

    def is_active(self, submission: Submission) -> bool:
        job = made.job_of(Kubectl.of(submission), submission)
        return job is not None and made.is_active(job)

    def logs(self, submission: Submission) -> PodLogs:
        return PodLogs(submission)

    def cancel(self, submission: Submission, task: int | None = None) -> str:
        kubectl, name = Kubectl.of(submission), submission.name
        job = made.job_of(kubectl, submission)
        others = [one for one in made.others_named(kubectl, submission) if made.is_ours(one, name)]
        if found := [*([job] if job else []), *others]:
            kubectl.delete(*(f"{made.RESOURCES[one['kind']]}/{one['metadata']['name']}" for one in found))
        done = "deleted" if job else "there is no"
        return (
            f"{done} {self.describe(submission)}; what the run has saved stays on the claim, and submitting the same "
            "job again goes on from it"
        )


def _find(kubectl: Kubectl, submission: Submission) -> states.Found:
    """What the cluster has of a submission."""
    job = made.job_of(kubectl, submission)
    pods = kubectl.find("pods", selector(submission.name)) if job else []
    if job is None or states.has_ended(job):
        return states.Found(job, pods)
    events: Sequence[Object] = ()
    workloads: Sequence[Object] = ()
    with contextlib.suppress(ForbiddenError):
        events = kubectl.find("events")
    if job["spec"].get("suspend"):
        with contextlib.suppress(SubmitError):  # a cluster without Kueue has none
            workloads = kubectl.find("workloads.kueue.x-k8s.io")
    return states.Found(job, pods, events, workloads)


def _token(name: str) -> Object:
    """The Secret with the key that Ray asks for in a plain job."""
    key = base64.b64encode(secrets.token_hex(32).encode()).decode()
    metadata = {"name": token_secret(name), "labels": selector(name)}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": {"auth_token": key}}


def _unseen_paths(job: JobConfig) -> Iterator[str]:
    """A warning for each path of the job that pods do not see."""
    mount = job.cluster.k8s.mount
    places = []
    for field, named in (("data.path", job.data.path), ("data.eval_path", job.data.eval_path)):
        paths = named if isinstance(named, list) else [named]
        places += [(field, path) for path in paths if path and job.data.source == "files"]
    places += [("checkpoint.path", job.checkpoint.path)] if job.checkpoint.path else []
    for field, path in (("model.path", job.model.path), ("tokenizer.path", job.tokenizer.path)):
        places += [(field, path)] if path and Path(path).is_dir() else []  # otherwise an id of the Hub
    for field, path in places:
        if "://" not in path and not Path(path).is_relative_to(mount):
            yield (
                f"{field} {path} is a path of this machine, and pods see only the claim, at {mount}; copy it there, "
                "or name a URL"
            )

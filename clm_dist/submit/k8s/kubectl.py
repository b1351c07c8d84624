"""Calls of kubectl.

kubectl instead of a library: it logs in as the user is used to, and makes the server check objects strictly.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from clm_dist.errors import ClusterAwayError, SubmitError
from clm_dist.submit.k8s.request import Object
from clm_dist.submit.submission import Submission

_REQUEST_TIMEOUT_S = 30
_AWAY = (
    "was refused - did you specify the right host or port?",
    "i/o timeout",
    "Unable to connect to the server",
    "ServiceUnavailable",
)
"""Words of kubectl for a server that does not answer."""
_TIMEOUT_S = 120
"""Timeout of a whole command, which may log in and makes several requests."""
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ForbiddenError(SubmitError):
    """The user lacks the permission."""


class NoKindError(SubmitError):
    """The server does not have this kind of objects."""


class NoKubectlError(SubmitError):
    """kubectl is not on the PATH."""


@dataclass(frozen=True)
class Kubectl:
    """kubectl, in one namespace of one cluster. A call that fails raises SubmitError with its output."""

    namespace: str
    context: str | None = None

    @classmethod
    def here(cls, namespace: str | None) -> Self:
        """With the current context, and its namespace unless another is given."""
        try:
            view = json.loads(_run(["config", "view", "--minify", "--output=json"]))
        except NoKubectlError:
            raise
        except SubmitError:  # a pod has no context
            own = _POD_NAMESPACE.read_text() if _POD_NAMESPACE.is_file() else "default"
            return cls(namespace or own)
        (context,) = view["contexts"]
        return cls(namespace or context["context"].get("namespace") or "default", view["current-context"])

    @classmethod
    def of(cls, submission: Submission) -> Self:
        """With the namespace and the context that a submission was made with."""
        assert submission.k8s
        return cls(submission.k8s.namespace, submission.k8s.context)

    def raw(self, path: str) -> Any:
        """The server's answer at a path."""
        return json.loads(self._ask("get", "--raw", path))

    def get(self, kind: str, name: str) -> Object | None:
        """An object, or None."""
        text = self._ask("get", kind, name, "--ignore-not-found", "--output=json")
        found: Object | None = json.loads(text) if text.strip() else None
        return found

    def find(self, kind: str, labels: dict[str, str] | None = None) -> list[Object]:
        """The objects of a kind in the namespace that have these labels."""
        selector = [f"--selector={_selector(labels)}"] if labels else []
        found: list[Object] = json.loads(self._ask("get", kind, *selector, "--output=json"))["items"]
        return found

    def apply(self, objects: Sequence[Object], *, dry_run: bool = False) -> None:
        """Make objects exactly as given, or let the server check them without making them."""
        options = ["--server-side", "--field-manager=clm-dist", "--force-conflicts", "--validate=strict"]
        options += ["--dry-run=server"] if dry_run else []
        given = "".join(f"---\n{json.dumps(one)}\n" for one in objects)
        self._ask("apply", *options, "--filename=-", given=given)

    def delete(self, *names: str) -> None:
        """Start to delete objects, `KIND/NAME`; missing ones are skipped."""
        self._ask("delete", *names, "--ignore-not-found", "--wait=false")

    def logs(self, labels: dict[str, str], since: str | None = None) -> str:
        """The logs of all containers of the pods with these labels.

        Args:
            since: time in the server's format; earlier lines are skipped.

        Returns:
            Lines `[pod/POD/CONTAINER] TIME TEXT`, pod by pod; `error: ...` for a container whose log cannot be read.
        """
        options = ["--all-containers", "--prefix", "--timestamps", "--ignore-errors", "--tail=-1"]
        options += [f"--since-time={since}"] if since else []
        return self._ask("logs", f"--selector={_selector(labels)}", *options)

    def last_lines(self, pod: str, count: int) -> list[str]:
        """The last lines of a pod's log."""
        return self._ask("logs", pod, f"--tail={count}").splitlines()

    def _ask(self, *arguments: str, given: str | None = None) -> str:
        where = [f"--namespace={self.namespace}", *([f"--context={self.context}"] if self.context else [])]
        return _run([*where, f"--request-timeout={_REQUEST_TIMEOUT_S}s", *arguments], given)


def _selector(labels: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _run(arguments: Sequence[str], given: str | None = None) -> str:
    command = ["kubectl", *arguments]
    try:
        # Logs may hold any bytes, whatever the locale.
        ended = subprocess.run(
            command, input=given, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT_S
        )
    except FileNotFoundError:
        raise NoKubectlError(
            "kubectl is not on the PATH; install it "
            "(https://kubernetes.io/docs/tasks/tools), or see what would be applied with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        problem = f"kubectl did not answer within {_TIMEOUT_S} s"
        raise ClusterAwayError(f"{problem}; `kubectl cluster-info` shows whether the cluster can be reached") from None
    if ended.returncode:
        said = (ended.stderr + ended.stdout).strip() or f"exit code {ended.returncode}"
        raise _kind_of(said)(f"kubectl: {said}")
    return ended.stdout


def _kind_of(said: str) -> type[SubmitError]:
    if any(words in said for words in _AWAY):
        return ClusterAwayError
    if "(Forbidden)" in said:
        return ForbiddenError
    return NoKindError if "the server doesn't have a resource type" in said else SubmitError

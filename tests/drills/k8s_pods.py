"""Pods that really run, for drills, and a job in them.

`../shared/k8s/podrun` runs pods as namespaces of this machine, with their own command, environment, user, volumes,
probes, grace and memory limit; its controllers do what the Job controller and the KubeRay operator do.
"""

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job
from clm_dist.files.run_dir import RunDir
from clm_dist.submit.k8s import render
from clm_dist.submit.k8s.request import Request, token_secret
from tests.conftest import ROOT, tiny_job, write_corpus
from tests.support.runs import RunView

SHARED = ROOT.parent / "shared" / "k8s"
TIMEOUT_S = 300
IMAGE = "clm-dist:drill"
SETTINGS = (
    f"cluster.k8s.image={IMAGE}",
    "cluster.k8s.pods=2",
    "cluster.k8s.memory_per_pod=3Gi",
    "cluster.k8s.head.memory=3Gi",
    "cluster.k8s.start_deadline_s=120",
)


def podrun(module: str = "podrun") -> Any:
    """A module beside the repository: `podrun`, `controllers`, or `minicluster`, which answers kubectl as well."""
    places = [str(SHARED / place) for place in ("podrun", "miniapi", "validate")]
    sys.path[:0] = [place for place in places if place not in sys.path]
    return importlib.import_module(module)


def image() -> dict[str, Any]:
    """What the pods run in: this machine's files, with the tests' own Python."""
    python = Path(os.path.realpath(sys.executable)).parent.parent
    places = [str(place) for place in (python, Path(sys.prefix), ROOT) if not str(place).startswith("/usr")]
    # What lies in a place that is there is there.
    places = [place for place in places if not any(place.startswith(f"{other}/") for other in places)]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        # Tiny models: see tests.conftest.
        **{name: os.environ[name] for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")},
    }
    return {"rootfs": "/", "bind": places, "env": environment}


class PodJob(RunView):
    """The tiny job, as objects of Kubernetes whose pods run here; a context manager."""

    def __init__(self, directory: Path, settings: Sequence[str], *, plain: bool = False, **request: Any) -> None:
        self.directory = directory
        self._claim = directory / "claim"
        self._claim.mkdir(parents=True, exist_ok=True)
        self._claim.chmod(0o777)
        corpus = write_corpus(self._claim)
        job = directory / "tiny.yaml"
        job.write_text(yaml.safe_dump(tiny_job(corpus)))
        self.job: JobConfig = load_job(job, [*SETTINGS, *settings, "data.path=/shared/corpus.jsonl"]).config
        super().__init__(RunDir(self._claim / "runs" / "tiny"))
        self._request = Request(plain=plain, **request)
        self.pods: list[Any] = []
        self.status: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PodJob":
        render.check_job(self.job, self._request)
        self.node = podrun().Node(
            self.directory / "pods", images={IMAGE: image()}, claims={"clm-dist": str(self._claim)}, time_scale=0.1
        )
        *others, self._object = render.objects(self.job, self._request)
        for one in others:
            self.node.add(one)
        token = {"metadata": {"name": token_secret("tiny")}, "stringData": {"auth_token": "0123456789abcdef" * 2}}
        self.node.add({"kind": "Secret", **token})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.node.close()

    def _run(self) -> None:
        if self._request.plain:
            self.status = podrun("controllers").run_job(self.node, self._object, self.pods.append)
        else:
            self.status = podrun("controllers").run_rayjob(self.node, self._object, self.pods.append)

    def kill(self, part: str) -> None:
        """End a pod's container with SIGKILL, as a machine that fails does."""
        os.kill(self.running(part).pid("ray"), signal.SIGKILL)

    def drain(self, part: str) -> None:
        """Begin to end a pod as `kubectl drain` does."""
        pod = self.running(part)
        threading.Thread(target=lambda: pod.delete(reason="DisruptionTarget"), daemon=True).start()

    def running(self, part: str) -> Any:
        """The pod that runs and has this in its name."""
        return next(pod for pod in reversed(self.pods) if part in pod.name and pod.phase == "Running")

    def said(self) -> str:
        """What the driver logged, over all attempts, and the ends of the pods' own logs."""
        logs = [*self._claim.glob("runs/.submitted/tiny/log-*"), *sorted((self.directory / "pods").glob("*/*.log"))]
        return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-3000:]}" for log in logs if log.exists())

    def wait_until(self, condition: Callable[[], Any]) -> float:
        """Wait while the job runs; gives the time."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self._thread.is_alive(), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)
        return time.monotonic()

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.last_step() >= step)

    def wait_ended(self) -> dict[str, Any]:
        """What the controllers say of the job."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), self.said()
        return self.status

    def hosts(self) -> list[list[str]]:
        """The pod of each worker, for every start."""
        return [record["hosts"] for record in self.records("start")]


@contextlib.contextmanager
def a_directory() -> Iterator[Path]:
    """Not below /tmp, which a volume covers in pods."""
    directory = Path(tempfile.mkdtemp(prefix="clm-dist-drill-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def processes_of(pod: Any, pattern: str) -> list[int]:
    """Processes of a pod, by this machine's numbers, whose command lines have this in them."""
    found = []
    for pid in subprocess.run(["ip", "netns", "pids", pod.netns], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [int(pid)] if pattern in line else []
    return found

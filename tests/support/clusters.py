"""A Kubernetes in memory for kubectl, of ../shared/k8s/miniapi, in which a test plays the controllers."""

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.command import Said, clm_dist

_MINIAPI = ROOT.parent / "shared" / "k8s" / "miniapi" / "miniapi.py"
RAY_JOB, JOB = ("ray.io/v1", "rayjobs"), ("batch/v1", "jobs")
Object = dict[str, Any]


@dataclass
class Kubernetes:
    """One cluster for all tests of a module; `clear` empties it."""

    miniapi: ModuleType
    store: Any
    server: Any
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "kubeconfig"

    def clear(self) -> None:
        """Only a claim is there, and every kind."""
        for key in [key for key in self.store.objs if key[3] not in ("default", "kube-system")]:
            del self.store.objs[key]
        self.store.kinds[:] = self.kinds
        self.store.logs.clear()
        self.store.history.clear()
        self.store.k8s = "1.33.0"
        self.server.kubeconfig(str(self.config))
        self.claim("clm-dist")

    def __post_init__(self) -> None:
        self.kinds = list(self.store.kinds)

    def lose(self, *plurals: str) -> None:
        """Be a cluster that has not these kinds."""
        self.store.kinds[:] = [kind for kind in self.kinds if kind[1] not in plurals]

    def claim(self, name: str) -> None:
        self.create("v1", "persistentvolumeclaims", name)

    def create(self, version: str, plural: str, name: str, **values: Any) -> Object:
        labels, owners = values.pop("labels", {}), values.pop("owners", [])
        metadata = {"name": name, "labels": labels, **({"ownerReferences": owners} if owners else {})}
        made: Object = self.store.create(version, plural, "default", {"metadata": metadata, **values})[0]
        return made

    def get(self, kind: tuple[str, str], name: str = "tiny") -> Object:
        found: Object = self.store.get(*kind, "default", name)
        return found

    def names(self) -> set[str]:
        """Of the objects that there are, but for the claim: `configmaps/tiny`."""
        keys = (key for key in self.store.objs if key[1] not in ("namespaces", "persistentvolumeclaims"))
        return {f"{plural}/{name}" for _, plural, _, name in keys}

    def set(self, kind: tuple[str, str], name: str = "tiny", **status: Any) -> None:
        """The status of an object, as its controller would."""
        self.store.status(*kind, "default", name, **status)

    def add_pod(self, name: str, role: str = "worker", *, run: str = "tiny", **values: Any) -> None:
        """A pod of a run; values: of its status, besides `node` and `labels`."""
        labels = {"app.kubernetes.io/instance": run, "app.kubernetes.io/part-of": "clm-dist"}
        labels |= {"app.kubernetes.io/component": role, **values.pop("labels", {})}
        spec: Object = {"containers": [{"name": "ray", "image": "i"}]}
        if node := values.pop("node", None):
            spec["nodeName"] = node
        self.create("v1", "pods", name, labels=labels, spec=spec, status={"phase": "Running", **values})

    def log(self, pod: str, *lines: str) -> None:
        """Add lines `TIME TEXT` to a pod's log; the time is the server's."""
        path = self.root / f"{pod}.log"
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
        self.store.logs["default", pod, "ray"] = str(path)

    def add_event(self, about: str, reason: str, message: str, when: str = "2099-01-01T00:00:00Z") -> None:
        self.create(
            "v1",
            "events",
            f"event-{len(self.store.objs)}",
            involvedObject={"kind": "RayCluster", "name": about},
            **{"reason": reason, "message": message, "type": "Warning", "lastTimestamp": when},
        )


def _log_with_times(handler: Any, ns: str, name: str, query: dict[str, str]) -> None:
    """As a kubelet does: with the times of lines, and from a time on, where that is asked."""
    store = handler.store
    pod = store.get("v1", "pods", ns, name)
    path = store.logs.get((ns, name, query.get("container") or pod["spec"]["containers"][0]["name"]))
    if path is None:
        said = f'container "ray" in pod "{name}" is waiting to start: ContainerCreating'
        raise sys.modules["miniapi"].ApiError(400, "BadRequest", said)
    lines = Path(path).read_bytes().splitlines(keepends=True)
    if "sinceTime" in query:
        since = datetime.fromisoformat(query["sinceTime"])
        lines = [line for line in lines if datetime.fromisoformat(line.split()[0].decode()) >= since]
    if "tailLines" in query:
        lines = lines[-int(query["tailLines"]) :]
    if query.get("timestamps") != "true":
        lines = [line.partition(b" ")[2] for line in lines]
    handler.reply(b"".join(lines))


@pytest.fixture(scope="module")
def whole_kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here")
    if not _MINIAPI.is_file():
        pytest.skip("../shared/k8s/miniapi is not here; it is not part of the repository")
    pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    spec = importlib.util.spec_from_file_location("miniapi", _MINIAPI)
    assert spec and spec.loader
    miniapi = importlib.util.module_from_spec(spec)
    sys.modules["miniapi"] = miniapi
    spec.loader.exec_module(miniapi)
    vars(miniapi)["Handler"].log_of = _log_with_times
    store = vars(miniapi)["Store"](str(_MINIAPI.parent.parent / "crds"))
    store.kinds.append(("v1", "resourcequotas", "ResourceQuota", True, "quota", ["status"]))
    store.kinds.append(("kueue.x-k8s.io/v1beta1", "workloads", "Workload", True, "wl", ["status"]))
    store.schemas["kueue.x-k8s.io/v1beta1", "Workload"] = {"type": "object", "x-crd": {}}
    server = vars(miniapi)["Server"](store)  # without a token: kubectl sends one over TLS alone
    yield Kubernetes(miniapi, store, server, tmp_path_factory.mktemp("kubernetes"))
    server.shutdown()
    server.server_close()


@pytest.fixture
def kubernetes(whole_kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kubernetes:
    whole_kubernetes.root = tmp_path / "a cluster"
    whole_kubernetes.root.mkdir()
    whole_kubernetes.clear()
    monkeypatch.setenv("KUBECONFIG", str(whole_kubernetes.config))
    return whole_kubernetes


@dataclass(frozen=True)
class KubernetesCommands:
    """`clm-dist` with a directory of runs and a job file."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    runs: Path
    job: Path

    def submit(self, *options: object) -> Said:
        return self.call("submit", "k8s", self.job, "--image", "registry.example/clm-dist:1", *options)

    def call(self, *arguments: object) -> Said:
        return clm_dist(self.capsys, self.monkeypatch, *arguments, "--runs", self.runs)


@pytest.fixture
def k8s_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> KubernetesCommands:
    job = tmp_path / "it's a job.yaml"
    job.write_text("name: tiny\ndata: {source: builtin}\nmodel: {path: gpt2}\n")
    return KubernetesCommands(capsys, monkeypatch, tmp_path / "the runs", job)

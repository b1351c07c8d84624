"""What is rendered for Kubernetes; `python -m tests.submit.test_k8s` writes k8s/ anew."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clm_dist.config.job import JobConfig
from clm_dist.config.k8s import num_bytes, shm_bytes, store_bytes
from clm_dist.config.load import load_job
from clm_dist.errors import ConfigError
from clm_dist.submit.k8s.render import check_job, objects, render
from clm_dist.submit.k8s.request import Code, Request, selector
from tests.conftest import ROOT

VALIDATE = ROOT.parent / "shared" / "k8s" / "validate" / "crdcheck.py"
IMAGE = "registry.example/clm-dist:0.1.0"
SMALL = ("pods=2", "memory_per_pod=2Gi", "head.memory=2Gi", "head.cpus=1", "scratch=2Gi")


def job_of(name: str, *settings: str) -> JobConfig:
    return load_job(ROOT / "jobs" / f"{name}.yaml", [f"cluster.k8s.image={IMAGE}", *settings]).config


def k8s_job(*settings: str, name: str = "eli5-full") -> JobConfig:
    """A job with fields of `cluster.k8s` set."""
    return job_of(name, *(f"cluster.k8s.{setting}" for setting in settings))


def rendered() -> dict[str, str]:
    """Every file of k8s/ that is rendered, by its path there."""
    found = {}
    for path, job, request in (
        ("base/eli5-full.yaml", job_of("eli5-full"), Request()),
        ("plain/eli5-full.yaml", job_of("eli5-full"), Request(plain=True)),
        ("overlays/local/quickstart.yaml", k8s_job(*SMALL, name="quickstart"), Request()),
    ):
        check_job(job, request)
        found[path] = render(job, request)
    return found


def validate(text: str, *options: str) -> str:
    """What crdcheck says of objects: schemas, unknown fields, KubeRay's rules."""
    if not VALIDATE.exists():
        pytest.skip("../shared/k8s (the schemas of KubeRay) is not here; it is not part of the repository")
    command = [sys.executable, str(VALIDATE), *options, "-"]
    ended = subprocess.run(command, input=text, capture_output=True, text=True)
    assert ended.returncode in (0, 1), ended.stderr
    return ended.stdout


def objects_by_kind(job: JobConfig, request: Request) -> dict[str, Any]:
    return {one["kind"]: one for one in objects(job, request)}


def pods_of(job: JobConfig, request: Request) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The templates of all pods, each with its container."""
    kinds = objects_by_kind(job, request)
    if request.plain:
        templates = [kinds["Job"]["spec"]["template"]]
    else:
        spec = kinds["RayJob"]["spec"]
        cluster = spec["rayClusterSpec"]
        templates = [spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
        templates += [group["template"] for group in cluster["workerGroupSpecs"]]
    for template in templates:
        (container,) = template["spec"]["containers"]
        yield template, container


def environment_of(container: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value") for one in container["env"]}


def test_the_files_of_k8s_are_what_is_rendered() -> None:
    for path, text in rendered().items():
        assert (ROOT / "k8s" / path).read_text() == text, f"{path} differs; `python -m tests.submit.test_k8s` writes it"


@pytest.mark.parametrize("path", rendered())
def test_what_is_rendered_passes_the_schemas_and_the_strictest_namespace(path: str) -> None:
    said = validate(rendered()[path], "--restricted")
    assert {line.rpartition(": ")[2] for line in said.splitlines()} == {"ok"}, said


def test_every_option_passes_the_schemas() -> None:
    job = k8s_job(
        "queue=q", "secret=s", "pull_secret=p", "namespace=n", "priority_class=high", "node_selector={gpu: a100}",
        "resources={rdma/hca: '1'}", "env={NCCL_DEBUG: INFO}", "start_deadline_s=60",
    )  # fmt: skip
    said = validate(
        render(job, Request(resume=True, overwrite=True, number="7", code=Code("YQ==", "1a2b"))), "--restricted"
    )
    assert {line.rpartition(": ")[2] for line in said.splitlines()} == {"ok"}, said


@pytest.mark.parametrize("overlay", ["base", "overlays/kueue", "overlays/rdma", "overlays/local"])
def test_kustomize_builds_what_passes_the_schemas(overlay: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on the PATH")
    built = subprocess.run(["kubectl", "kustomize", str(ROOT / "k8s" / overlay)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    options = [] if overlay.endswith("rdma") else ["--restricted"]
    said = validate(built.stdout, *options)
    assert {line.rpartition(": ")[2] for line in said.splitlines()} == {"ok"}, said
    (job,) = (one for one in yaml.safe_load_all(built.stdout) if one["kind"] == "RayJob")
    if overlay.endswith("kueue"):
        assert job["spec"]["suspend"]
        assert job["metadata"]["namespace"] == "training"
    if overlay.endswith("rdma"):
        pod = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
        assert pod["resources"]["limits"]["rdma/hca_shared_devices_a"] == "1"
        assert pod["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}


_RENDER = """
import sys
from pathlib import Path
from clm_dist.config.load import load_job
from clm_dist.submit.k8s.request import Request
from clm_dist.submit.k8s.render import render
job = load_job(Path(sys.argv[1]), [f"cluster.k8s.image={sys.argv[2]}"]).config
print(render(job, Request()), end="")
"""


def test_it_is_the_same_on_every_host(tmp_path: Path) -> None:
    host = {"PATH": "", "PYTHONPATH": str(ROOT), "HOSTNAME": "elsewhere", "TZ": "Asia/Tokyo", "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-c", _RENDER, str(ROOT / "jobs" / "eli5-full.yaml"), IMAGE]
    ended = subprocess.run(command, cwd=tmp_path, env=host, capture_output=True, text=True)
    assert ended.stdout == (ROOT / "k8s" / "base" / "eli5-full.yaml").read_text(), ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_job_file_travels_as_it_is(tmp_path: Path) -> None:
    hostile = "a 'b' \"c\" $HOME `id` {x}: #y\\n"
    job = k8s_job().model_copy(update={"data": k8s_job().data.model_copy(update={"dataset": hostile + "\nline"})})
    config = next(one for one in yaml.safe_load_all(render(job, Request())) if one["kind"] == "ConfigMap")
    file = tmp_path / "job.yaml"
    file.write_text(config["data"]["job.yaml"])
    assert load_job(file).config == job


@pytest.mark.parametrize("plain", [False, True])
def test_a_secret_is_named_and_never_shown(plain: bool) -> None:
    request = Request(plain=plain)
    job = k8s_job("secret=hub")
    for template, container in pods_of(job, request):
        if template["metadata"]["labels"]["app.kubernetes.io/component"] != "driver":
            assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]
    kinds = objects_by_kind(job, request)
    assert "Secret" not in kinds
    if plain:
        (token,) = (
            one
            for one in kinds["Job"]["spec"]["template"]["spec"]["containers"][0]["env"]
            if one["name"] == "RAY_AUTH_TOKEN"
        )
        assert token["valueFrom"] == {"secretKeyRef": {"name": "eli5-full-ray", "key": "auth_token"}}
    else:
        assert kinds["RayJob"]["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("plain", [False, True])
def test_a_variable_of_the_job_goes_before_the_pods_own(plain: bool) -> None:
    request = Request(plain=plain)
    small = ("pods=2", "gpus_per_pod=0")
    names = {name for _, container in pods_of(k8s_job(*small), request) for name in environment_of(container)}
    # The others are refused in a job.
    free = [name for name in sorted(names) if not name.startswith(("CLM_DIST_", "RAY_AUTH_", "POD_"))]
    assert {"HF_HOME", "HOME", "NVIDIA_VISIBLE_DEVICES", "PYTHONUNBUFFERED"} < set(free)
    mine = k8s_job(*small, f"env={{{', '.join(f'{name}: mine' for name in free)}}}")
    for _, container in pods_of(mine, request):
        assert {name: environment_of(container).get(name) for name in free} == dict.fromkeys(free, "mine")
        set_names = [one["name"] for one in container["env"]]
        assert len(set_names) == len(set(set_names))


@pytest.mark.parametrize("plain", [False, True])
def test_pods_may_do_little_and_have_what_they_ask_for(plain: bool) -> None:
    request = Request(plain=plain)
    job = k8s_job("memory_per_pod=8Gi")
    for template, container in pods_of(job, request):
        spec = template["spec"]
        assert template["metadata"]["labels"].items() >= selector("eli5-full").items()
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        limits = container["resources"]["limits"]
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        assert ("nvidia.com/gpu" in limits) == (component == "worker")
        if component == "driver":
            continue
        (shm,) = (volume for volume in spec["volumes"] if volume["name"] == "shm")
        assert int(shm["emptyDir"]["sizeLimit"]) == num_bytes("8Gi") // 4
        assert environment_of(container)["CLM_DIST_NODES"] == ("2" if plain else "3")
        assert spec["terminationGracePeriodSeconds"] == 120
        assert container["lifecycle"]["preStop"]["exec"]["command"][-1] == "clm_dist.submit.in_pod.end"


def test_shared_memory_and_the_object_store_are_parts_of_the_memory() -> None:
    assert shm_bytes("1Gi") == 2**28
    assert shm_bytes("512Gi") == 16 * 2**30
    # Ray takes no object store of less than 75 MiB.
    assert store_bytes("1Gi") >= 75 * 2**20


def test_the_head_has_no_workers_and_starts_when_all_fit() -> None:
    spec = objects_by_kind(k8s_job(), Request())["RayJob"]["spec"]
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    assert spec["preRunningDeadlineSeconds"] == 3600
    assert "suspend" not in spec
    queued = objects_by_kind(k8s_job("queue=q"), Request())["RayJob"]
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert queued["spec"]["suspend"]
    # It may wait in the queue for as long as it takes.
    assert "preRunningDeadlineSeconds" not in queued["spec"]


def test_the_ports_are_open_to_the_pods_of_the_job_and_the_operator_alone() -> None:
    policy = objects_by_kind(k8s_job(), Request())["NetworkPolicy"]["spec"]
    own, operator = policy["ingress"]
    assert policy["policyTypes"] == ["Ingress"]
    assert own == {"from": [{"podSelector": policy["podSelector"]}]}
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}]
    assert len(objects_by_kind(k8s_job(), Request(plain=True))["NetworkPolicy"]["spec"]["ingress"]) == 1


@pytest.mark.parametrize("plain", [False, True])
def test_the_figures_of_a_run_are_open_to_prometheus_alone(plain: bool) -> None:
    request = Request(plain=plain)
    env = "cluster.k8s.env={OTEL_EXPORTER_PROMETHEUS_PORT: '9999'}"
    without, job = (job_of("eli5-full", f"tracking=[{tracker}]", env) for tracker in ("tensorboard", "prometheus"))
    ingress = objects_by_kind(job, request)["NetworkPolicy"]["spec"]["ingress"]
    assert ingress[:-1] == objects_by_kind(without, request)["NetworkPolicy"]["spec"]["ingress"]
    labels = {"app.kubernetes.io/name": "prometheus"}
    assert ingress[-1] == {
        "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": labels}}],
        "ports": [{"port": 9999, "protocol": "TCP"}],
    }
    host = "OTEL_EXPORTER_PROMETHEUS_HOST"
    assert all(environment_of(container)[host] == "0.0.0.0" for _, container in pods_of(job, request))
    assert all(host not in environment_of(container) for _, container in pods_of(without, request))
    own = job_of("eli5-full", "tracking=[prometheus]", f"cluster.k8s.env={{{host}: 127.0.0.1}}")
    assert all(environment_of(container)[host] == "127.0.0.1" for _, container in pods_of(own, request))
    assert validate(render(job, request)) == validate(render(without, request))
    for port, message in (("0", "Prometheus must know the port"), ("x", "is 'x', which is not a port")):
        wrong = job_of("eli5-full", "tracking=[prometheus]", env.replace("9999", port))
        with pytest.raises(ConfigError, match=message):
            check_job(wrong, request)


def test_only_what_trying_again_mends_is_tried_again() -> None:
    spec = objects_by_kind(k8s_job("max_retries=5"), Request(plain=True))["Job"]["spec"]
    assert spec["backoffLimit"] == 10
    first, second = spec["podFailurePolicy"]["rules"]
    assert (first["action"], first["onExitCodes"]["values"]) == ("FailJob", [2])
    assert (second["action"], second["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert objects_by_kind(k8s_job("max_retries=5"), Request())["RayJob"]["spec"]["backoffLimit"] == 5


def test_code_of_a_working_tree_goes_before_the_images() -> None:
    request = Request(code=Code(base64.b64encode(b"zip").decode(), "1a2b-changed"))
    assert objects_by_kind(k8s_job(), request)["ConfigMap"]["binaryData"] == {"code.zip": "emlw"}
    for _, container in pods_of(k8s_job(), request):
        environment = environment_of(container)
        assert environment["PYTHONPATH"] == "/etc/clm-dist/code.zip"
        assert environment["CLM_DIST_COMMIT"] == "1a2b-changed"


def test_a_cluster_that_names_the_user_itself_gets_none() -> None:
    for template, _ in pods_of(k8s_job("user=null", "group=null"), Request()):
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & security.keys()


def test_the_images_ray_is_the_one_that_is_required() -> None:
    version = objects_by_kind(k8s_job(), Request())["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"]
    requirement = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if '"ray[train]' in line)
    assert f">={version.rpartition('.')[0]}," in requirement


def test_overwriting_and_resuming_reach_the_driver() -> None:
    request = Request(resume=True, overwrite=True)
    entrypoint = "python -m clm_dist.submit.in_pod.driver --resume --overwrite"
    spec = objects_by_kind(k8s_job(), request)["RayJob"]["spec"]
    assert spec["entrypoint"] == entrypoint
    (container,) = spec["submitterPodTemplate"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "clm_dist.submit.in_pod.submitter", *entrypoint.split()]
    command = objects_by_kind(k8s_job(), Request(plain=True, resume=True, overwrite=True))["Job"]["spec"]["template"][
        "spec"
    ]["containers"][0]["command"]
    assert command[command.index("--") + 1 :] == entrypoint.split()


def main() -> None:
    for path, text in rendered().items():
        (ROOT / "k8s" / path).write_text(text)
        print(json.dumps(path))


if __name__ == "__main__":
    main()

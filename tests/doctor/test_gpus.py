"""What nvidia-smi prints, and the findings of it."""

import os
from pathlib import Path

import pytest

from clm_dist.doctor.finding import Finding
from clm_dist.doctor.gpus import Gpu, Gpus, Holder, devices_of, judge_gpus, parse_gpus, parse_holders, read_gpus

# As drivers 550 and 580 print it for an H200, and for a card without ECC.
PRINTED = """\
0, GPU-1a, NVIDIA H200, 143771, 4, 580.65.06, 0, 0x0000000000000001
1, GPU-2b, NVIDIA H200, 143771, 71000, 580.65.06, 2, 0x0000000000000048
2, GPU-3c, NVIDIA GeForce RTX 4090, 24564, [N/A], 580.65.06, [N/A], Not Active
"""
APPS = f"GPU-2b, {os.getpid()}, /usr/bin/python3, 70900\nGPU-2b, [N/A], [Not Found], [N/A]\n"


def a_gpu(**changes: object) -> Gpus:
    values: dict[str, object] = {
        "index": 0,
        "uuid": "GPU-1a",
        "name": "NVIDIA H200",
        "memory": 143771,
        "used": 4,
        "driver": "580.65.06",
        "ecc_errors": 0,
        "slowed": 1,
    }
    return Gpus((Gpu(**values | changes),))  # type: ignore[arg-type]  # the fields by their names


def judged(found: Gpus, wants_gpus: bool | None = None, granted: float = 0) -> list[Finding]:
    return list(judge_gpus(found, wants_gpus=wants_gpus, granted=granted))


def test_what_nvidia_smi_prints_is_read() -> None:
    first, second, third = parse_gpus(PRINTED)
    assert (first.name, first.memory, first.used, first.ecc_errors, first.slowed) == ("NVIDIA H200", 143771, 4, 0, 1)
    assert (second.ecc_errors, second.slowed) == (2, 0x48)
    assert (third.used, third.ecc_errors, third.slowed) == (0, None, 0)


def test_a_driver_without_gpus_has_none() -> None:
    assert parse_gpus("No devices were found\n") == ()


def test_who_holds_memory_is_read() -> None:
    (holder,) = parse_holders(APPS)
    assert (holder.uuid, holder.pid, holder.memory) == ("GPU-2b", os.getpid(), 70900)
    assert holder.user == Path(f"/proc/{os.getpid()}").owner()


@pytest.mark.parametrize("older", [False, True])
def test_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, older: bool) -> None:
    """A program that stands for it; an older one does not know the newer name of a field."""
    program = tmp_path / "nvidia-smi"
    refused = 'case "$*" in *clocks_event*) echo "Field is not valid."; exit 2 ;; esac\n' if older else ""
    answers = f"--query-gpu*) cat <<END\n{PRINTED}END\n;;\n*) cat <<END\n{APPS}END\n;;\n"
    program.write_text(f'#!/bin/sh\n{refused}case "$1" in\n{answers}esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

    def find_problem() -> str:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        return "torch 2.13.0 has no CUDA"

    monkeypatch.setattr("clm_dist.doctor.gpus.find_problem", find_problem)
    found = read_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert (len(found.gpus), len(found.holders), found.usable, found.problem) == (3, 1, 1, None)
    assert found.torch_problem == "torch 2.13.0 has no CUDA"


def test_an_nvidia_smi_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch' >&2\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (finding,) = judged(read_gpus(), wants_gpus=True)
    assert finding.severity == "error"
    assert "Driver/library version mismatch" in finding.what
    assert judged(read_gpus(), wants_gpus=False)[0].severity == "warning"


def test_a_machine_without_gpus_is_as_it_should_be() -> None:
    assert [finding.severity for finding in judged(Gpus())] == ["note"]


def test_gpus_that_are_granted_and_not_seen_are_not_checked() -> None:
    assert [finding.severity for finding in judged(Gpus(), granted=2)] == ["unchecked"]


def test_a_free_gpu_is_ok() -> None:
    assert [finding.severity for finding in judged(a_gpu())] == ["ok"]


def test_who_holds_a_gpu_is_named() -> None:
    found = a_gpu(used=71000)
    (finding,) = judged(Gpus(found.gpus, (Holder("GPU-1a", 7, "/opt/train.py", "bob", 70900),)))
    assert "process 7 (train.py of bob, 69.2 GiB)" in finding.what
    (finding,) = judged(found)
    assert "not seen from here" in finding.what


def test_errors_of_memory_and_slow_clocks_are_told() -> None:
    ecc, slow = judged(a_gpu(ecc_errors=2, slowed=0x48))
    assert "2 errors of memory" in ecc.what
    assert "hardware slowdown, heat (hardware)" in slow.what


def test_an_idle_gpu_and_one_at_its_power_limit_are_not_slow() -> None:
    assert [finding.severity for finding in judged(a_gpu(slowed=0x5))] == ["ok"]


def test_a_torch_that_cannot_use_the_gpus_is_an_error_where_they_are_wanted() -> None:
    found = Gpus(a_gpu().gpus, torch_problem="torch 2.13.0 has no CUDA")
    assert judged(found)[0].severity == "error"
    assert judged(found, wants_gpus=False)[0].severity == "ok"


@pytest.mark.parametrize(
    ("visible", "devices"),
    [("", []), ("0,1", ["0", "1"]), ("1,-1,0", ["1"]), ("GPU-1a,GPU-2b", ["GPU-1a", "GPU-2b"]), ("none", [])],
)
def test_visible_devices_end_at_the_first_that_is_none(visible: str, devices: list[str]) -> None:
    assert devices_of(visible) == devices


def test_hidden_gpus_are_told() -> None:
    hidden = Gpus(a_gpu().gpus, visible="")
    assert hidden.usable == 0
    assert judged(hidden)[0].severity == "warning"

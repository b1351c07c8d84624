"""The GPUs of a node, as nvidia-smi and NVIDIA's driver show them, and whether its torch can use them."""

import contextlib
import csv
import os
import pwd
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clm_dist.doctor.bounded import output_of
from clm_dist.doctor.finding import Finding, error, note, ok, unchecked, warning
from clm_dist.train.cuda import find_problem

_TIMEOUT_S = 5
_FIELDS = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.used",
    "driver_version",
    "ecc.errors.uncorrected.volatile.total",
)
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The names of one field in newer and older drivers."""
_SLOWED = {0x08: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}
"""Bits of that field that a person should know of; an idle GPU and one at its power limit are as they should be."""
_HELD_MIB = 512
"""A driver and its display take less."""


@dataclass(frozen=True)
class Gpu:
    """A GPU; memory in MiB."""

    index: int
    uuid: str
    name: str
    memory: int
    used: int
    driver: str
    ecc_errors: int | None
    """Errors since the last reset that were not corrected; None where it does not count them."""
    slowed: int
    """Bits that say why its clocks are low."""


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU."""

    uuid: str
    pid: int
    program: str
    user: str
    memory: int


@dataclass(frozen=True)
class Gpus:
    """What a node knows of its GPUs."""

    gpus: tuple[Gpu, ...] = ()
    holders: tuple[Holder, ...] = ()
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    problem: str | None = None
    """Why nvidia-smi tells nothing, on a node that has it."""
    torch_problem: str | None = None
    """What keeps torch from the GPUs."""

    @property
    def usable(self) -> int:
        """GPUs that a program of this environment sees."""
        return len(self.gpus) if self.visible is None else min(len(self.gpus), len(devices_of(self.visible)))


def devices_of(visible: str) -> list[str]:
    """The devices that CUDA_VISIBLE_DEVICES names: those before the first that is none."""
    found = []
    for name in filter(None, map(str.strip, visible.split(","))):
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", name):
            break
        found.append(name)
    return found


def read_gpus() -> Gpus:
    """Ask nvidia-smi; a node without it has no GPUs of NVIDIA. The driver is asked in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None:
        return Gpus(visible=visible)
    try:
        gpus = parse_gpus(_ask_gpus())
        apps = _query("compute-apps", ("gpu_uuid", "pid", "process_name", "used_memory"))
    except (OSError, ValueError) as problem:
        return Gpus(visible=visible, problem=str(problem))
    of_torch = find_problem() if gpus else None
    if visible is not None:
        # The question has removed it.
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return Gpus(gpus, parse_holders(apps), visible, torch_problem=of_torch)


def _ask_gpus() -> str:
    newer, older = _REASONS
    try:
        return _query("gpu", (*_FIELDS, newer))
    except TimeoutError:
        raise
    except OSError:
        return _query("gpu", (*_FIELDS, older))


def _query(what: str, fields: tuple[str, ...]) -> str:
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    return output_of(command, _TIMEOUT_S)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The GPUs in what nvidia-smi prints of `_FIELDS` and the reasons of their clocks."""
    if text.strip().startswith("No devices"):
        return ()
    return tuple(
        Gpu(int(index), uuid, name, _amount(memory), _amount(used), driver, _number(ecc), _amount(slowed))
        for index, uuid, name, memory, used, driver, ecc, slowed in _rows(text)
    )


def parse_holders(text: str) -> tuple[Holder, ...]:
    return tuple(
        Holder(uuid, int(pid), program, _user_of(int(pid)), _amount(used))
        for uuid, pid, program, used in _rows(text)
        if pid.isdigit()
    )


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]


def _number(text: str) -> int | None:
    """A number of nvidia-smi, also `0x0000000000000008`; None for `[N/A]` and the like."""
    try:
        return int(text, 0)
    except ValueError:
        return None


def _amount(text: str) -> int:
    return _number(text) or 0


def _user_of(pid: int) -> str:
    with contextlib.suppress(OSError, KeyError):
        return pwd.getpwuid(Path(f"/proc/{pid}").stat().st_uid).pw_name
    return ""


def judge_gpus(found: Gpus, *, wants_gpus: bool | None, granted: float = 0) -> Iterator[Finding]:
    """The findings of one node.

    Args:
        wants_gpus: whether the job takes GPUs; None takes them where there are any.
        granted: GPUs that a scheduler granted on this node.
    """
    if found.problem:
        make = error if wants_gpus else warning
        yield make(
            "gpus",
            f"nvidia-smi tells nothing of the GPUs: {found.problem}",
            "the driver or a GPU does not answer, and workers that ask it wait or fail",
            "look at `nvidia-smi` and `dmesg | grep -i nvrm` on this node; load the driver, or reset the GPU",
        )
        return
    if not found.gpus:
        if granted:
            yield unchecked("gpus", f"the {granted:g} GPUs that Slurm grants, because there is no nvidia-smi here")
        else:
            yield note("gpus", "no GPU of NVIDIA is here: there is no nvidia-smi")
        return
    problems = [*_judge_use(found, wants_gpus), *(finding for gpu in found.gpus for finding in _judge_gpu(found, gpu))]
    yield from problems
    if not problems:
        names = " and ".join(sorted({gpu.name for gpu in found.gpus}))
        free = min(gpu.memory - gpu.used for gpu in found.gpus)
        yield ok(
            "gpus",
            f"{len(found.gpus)} x {names}, driver {found.gpus[0].driver}, {free / 1024:.1f} GiB free on each or more",
        )


def _judge_use(found: Gpus, wants_gpus: bool | None) -> Iterator[Finding]:
    if found.torch_problem and wants_gpus is not False:
        yield error(
            "gpus",
            f"{found.torch_problem}, and there are GPUs",
            "a run whose workers take GPUs is refused",
            "install a torch for this driver (https://pytorch.org/get-started/locally), or set "
            "cluster.gpus_per_worker to 0 to train on CPUs",
        )
    if found.usable < len(found.gpus) and wants_gpus is not False:
        make = warning if found.usable == 0 else note
        yield make(
            "gpus",
            f"CUDA_VISIBLE_DEVICES={found.visible} shows {found.usable} of {len(found.gpus)} GPUs",
            "a run here takes those alone; with none, cluster.gpus_per_worker auto trains on CPUs",
            "unset CUDA_VISIBLE_DEVICES, or leave it if that is meant",
        )


def _judge_gpu(found: Gpus, gpu: Gpu) -> Iterator[Finding]:
    name = f"GPU {gpu.index} ({gpu.name})"
    if gpu.used > _HELD_MIB:
        held = [holder for holder in found.holders if holder.uuid == gpu.uuid]
        by = ", ".join(
            f"process {holder.pid} ({Path(holder.program).name}{f' of {holder.user}' if holder.user else ''}, "
            f"{holder.memory / 1024:.1f} GiB)"
            for holder in held
        )
        yield warning(
            "gpus",
            f"{name}: {gpu.used / 1024:.1f} of {gpu.memory / 1024:.1f} GiB are held by "
            f"{by or 'processes that are not seen from here, perhaps of another container'}",
            "a worker that lacks memory fails, or halves the blocks of a pass",
            "end these processes, or take other GPUs with CUDA_VISIBLE_DEVICES",
        )
    if gpu.ecc_errors:
        yield warning(
            "gpus",
            f"{name}: {gpu.ecc_errors} errors of memory that ECC could not correct",
            "a program that reads such memory is ended, and workers start again from the last checkpoint",
            f"nvidia-smi -i {gpu.index} --gpu-reset while nothing uses it; have it looked at if they come again",
        )
    if reasons := [reason for bit, reason in _SLOWED.items() if gpu.slowed & bit]:
        yield warning(
            "gpus",
            f"{name} runs slower than it could: {', '.join(reasons)}",
            "all workers wait for the slowest",
            f"nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER -i {gpu.index} tells more; look at cooling and power",
        )

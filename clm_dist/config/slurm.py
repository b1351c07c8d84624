"""The section `cluster.slurm` of a job file: the resources and the environment of a Slurm job."""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from clm_dist.config.section import MOST, Count, Section, without_removed, wrong
from clm_dist.config.shown import shown

_OWN_OPTIONS = {
    "account": "account",
    "array": "--array of `clm-dist submit slurm`",
    "cpus-per-gpu": "cpus_per_node",
    "cpus-per-task": "cpus_per_node, or cpus in prepare",
    "gpus-per-socket": "gpus_per_node",
    "job-name": "the job's name",
    "nodes": "nodes",
    "partition": "partition",
    "requeue": "max_requeues",
    "no-requeue": "max_requeues",
    "signal": "signal_s",
    "time": "time",
    "tres-per-task": "gpus_per_node and cpus_per_node",
}
"""Options of sbatch that have a field of their own, with the field's name."""
_FIXED_OPTIONS = {
    "error",
    "no-kill",
    "ntasks",
    "ntasks-per-gpu",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "wrap",
}
# With these, sbatch does not queue the job, or queues it elsewhere.
_FIXED_OPTIONS |= {"clusters", "help", "test-only", "version", "wait"}
_FLAGS = {
    **dict.fromkeys(["contiguous", "hold", "overcommit", "oversubscribe", "quiet", "reboot", "spread-job"], ()),
    **dict.fromkeys(["use-min-nodes", "verbose"], ()),
    "exclusive": ("user", "mcs", "topo"),
}
"""Options of sbatch that need no value, with the values that they may have."""
_GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task")
"""Options of sbatch that ask for GPUs alone: in all, of each host, and of each task, of which a host has one."""
_GPUS = r"(?:[\w.-]+:)?\d{1,10}"
_GRES_GPU = re.compile(r"(?:gres[/:])?gpu(?::(?:[\w.-]+:)?(\d{1,10})|:[\w.-]*[A-Za-z][\w.-]*)?", re.ASCII)
_REMOVED = {
    "conda": (
        'write `eval "$(conda shell.bash hook)"` and `conda activate NAME` as lines of cluster.slurm.setup, and set '
        "cluster.slurm.venv to the directory of the environment"
    ),
    "modules": "write `module load NAME` as a line of cluster.slurm.setup",
}
_TIME_OPTIONS = ("begin", "deadline", "time-min")
"""Options that YAML may read as numbers: 16:00 is 960."""
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)


def _one_line(text: str) -> str:
    if not text or re.search(r"[\x00-\x1f]", text):
        raise PydanticCustomError("line", "it must be text without line breaks, which #SBATCH cannot hold")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Options = dict[str, str | int | float | bool | None]
"""Options of sbatch by their long names; true sets an option without a value, null and false omit it."""


def _flag(name: str, value: object) -> bool | str | None:
    """The value of an option that needs none. `--option exclusive=true` has it as text."""
    if value is None or isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return value == "true"
    if isinstance(value, str) and value in _FLAGS[name]:
        return value
    others = f", or {', '.join(_FLAGS[name])}" if _FLAGS[name] else ""
    raise PydanticCustomError("option", f"{name} is an option without a value; write true{others}")


def _check_gpus(value: object) -> object:
    """GPUs as Slurm writes them: a number, or numbers with types."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,10}", value, re.ASCII):
        value = int(value)
    if isinstance(value, str) and re.fullmatch(f"{_GPUS}(,{_GPUS})*", value, re.ASCII):
        if count_gpus(value) <= MOST:
            return value
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST:
        return value
    raise PydanticCustomError("gpus", "not a number of GPUs; write 8, or a100:8 for GPUs of a type")


def count_gpus(request: int | str) -> int:
    """The number in a request for GPUs: 6 of `6` and of `a100:4,v100:2`."""
    return sum(int(gpus.rpartition(":")[2]) for gpus in str(request).split(","))


def _gpus_in_gres(gres: object) -> int:
    """GPUs of each host in the option gres: 2 of `gpu:a100:2,nvme:1`, 1 of `gpu`."""
    found = 0
    for item in str(gres or "").split(","):
        if gpus := _GRES_GPU.fullmatch(item):
            found += int(gpus[1] or 1)
        elif re.match(r"(gres[/:])?gpu\b", item):
            problem = f"{shown(item)} is not understood; write gres=gpu:2, or gres=gpu:a100:2 for GPUs of a type"
            raise PydanticCustomError("option", problem)
        elif re.match(r"(gres[/:])?(mps|shard)\b", item):
            problem = (
                f"{shown(item)} is a share of a GPU, and a worker takes a whole one; write gres=gpu:1, or gpus_per_node"
            )
            raise PydanticCustomError("option", problem)
    return found


def _seconds(time: str) -> float:
    """A time in Slurm's format as seconds; see --time in sbatch's manual."""
    if time[0] in "UIui":
        return math.inf
    days, dash, rest = time.rpartition("-")
    parts = [float(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0, 0][:3]
    elif len(parts) == 1:
        hours, minutes, seconds = 0, parts[0], 0
    else:
        hours, minutes, seconds = [0, *parts][-3:]
    return ((float(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_time(value: object) -> object:
    """YAML reads 2:00:00 as a number of seconds, and Slurm reads a number as minutes."""
    if value is None or (isinstance(value, str) and _TIME.fullmatch(value)):
        return value
    advice = 'a number; write it in quotes, "2:00:00"' if isinstance(value, int) else "not a time of Slurm"
    raise PydanticCustomError("time", f"{advice}; it takes minutes, [hours:]minutes:seconds or days-hours[:minutes]")


class SlurmPart(Section):
    """The fields of both the training job and the preparing job."""

    partition: Line | None = None
    """Partition; null is the cluster's default."""
    account: Line | None = None
    """Account to charge."""
    time: str | None = None
    """Time limit in Slurm's format, in quotes: `"2:00:00"`, `"1-12"`; null is the partition's default."""
    options: Options = {}
    """Any other option of sbatch by its long name: `{constraint: a100, exclusive: true, mail-user: me@here}`."""

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_slurms(cls, value: object) -> object:
        return _check_time(value)

    @field_validator("options")
    @classmethod
    def _options_can_be_set(cls, options: Options) -> Options:
        for name, value in options.items():
            if name in _FLAGS:
                options = {**options, name: _flag(name, value)}
            if name in _OWN_OPTIONS:
                place = f"{name} has a field of its own: {_OWN_OPTIONS[name]}"
                raise PydanticCustomError("option", f"{place}; remove it here")
            if name in _FIXED_OPTIONS:
                raise PydanticCustomError("option", f"{name} is set by clm-dist, which relies on it; remove it")
            if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
                raise PydanticCustomError(
                    "option",
                    f"{shown(repr(name))} is not a long option of sbatch; write it without leading dashes, as in "
                    "mail-user",
                )
            if isinstance(value, str):
                _one_line(value)
            if name in _GPU_OPTIONS and value is not None:
                _check_gpus(value)
            if name == "gres":
                _gpus_in_gres(value)
            if name in _TIME_OPTIONS and isinstance(value, int):
                raise PydanticCustomError("option", f'{name} is the number {value}; write it in quotes, "16:00"')
        return options


class PrepareJob(SlurmPart):
    """The CPU job that `--prepare-first` puts before the training job; its partition may be another."""

    cpus: Count = 4
    """CPUs, on one node."""


class Container(Section):
    """The container image of Ray and the driver."""

    image: Line
    """Image: a file (`.sqsh`, `.sif`) or another name that the runtime accepts."""
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """Runtime: Slurm's plug-in Pyxis with Enroot, or Apptainer."""
    mounts: list[Line] = []
    """Directories of the host to mount, `/data` or `/data:/mnt`; runs and store are always mounted."""


class SlurmConfig(SlurmPart):
    """A Slurm job: its nodes, its time, and the environment in which clm-dist is installed."""

    nodes: Count = 1
    """Hosts."""
    gpus_per_node: int | str = 0
    """GPUs of each host: a number, or `a100:8` for GPUs of a type."""
    cpus_per_node: Count | None = None
    """CPUs of each host; null is as many as its workers take."""
    signal_s: Count = 120
    """Seconds before the time limit at which the run saves and the job is requeued; Slurm may be a minute early."""
    max_requeues: Annotated[int, Field(ge=0, le=MOST)] = 20
    """How often the job may be requeued, for any reason; 0 is never."""
    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:@-]+$")] | None = None
    """Network interface between the hosts, such as `ib0`; null is the one of the route between them."""
    setup: str | None = None
    """Shell lines that the first host runs before all else, such as `module load cuda`; all hosts see what they
    export."""
    venv: str | None = None
    """Directory of the environment that clm-dist is installed in, of venv or conda; null is the one that `submit` runs
    in."""
    container: Container | None = None
    """Container image instead."""
    prepare: PrepareJob = PrepareJob()
    """The job of `--prepare-first`."""

    @property
    def gpus_request(self) -> int | str:
        """What is asked for as GPUs of each host; 0 where `gres` asks, or nothing does."""
        if (total := self.options.get("gpus")) is not None:
            return ",".join(
                re.sub(r"\d+$", lambda count: str(int(count[0]) // self.nodes), gpus) for gpus in str(total).split(",")
            )
        options = (self.options.get(name) for name in ("gpus-per-node", "gpus-per-task"))
        return next((str(gpus) for gpus in options if gpus is not None), self.gpus_per_node)

    @property
    def num_gpus(self) -> int:
        """GPUs of each host, whichever field or option asks for them."""
        return count_gpus(self.gpus_request) + _gpus_in_gres(self.options.get("gres"))

    @property
    def other_options(self) -> Options:
        """The options but for those that are in `gpus_request`."""
        return {name: value for name, value in self.options.items() if name not in _GPU_OPTIONS}

    @field_validator("gpus_per_node", mode="before")
    @classmethod
    def _gpus_are_counted(cls, value: object) -> object:
        return _check_gpus(value)

    @model_validator(mode="after")
    def _gpus_are_asked_for_once(self) -> Self:
        asking = [f"options.{name}" for name in _GPU_OPTIONS if self.options.get(name) is not None]
        asking += ["options.gres"] if _gpus_in_gres(self.options.get("gres")) else []
        asking += ["gpus_per_node"] if self.gpus_per_node else []
        if len(asking) > 1:
            problem = f"cluster.slurm: {' and '.join(asking)} ask for GPUs; keep one of them"
            advice = " (--set cluster.slurm.gpus_per_node=0 removes that one)" if self.gpus_per_node else ""
            raise wrong("cluster.slurm.options", problem + advice, "cluster.slurm.gpus_per_node")
        total = str(self.options.get("gpus") or "")
        if any(int(gpus.rpartition(":")[2]) % self.nodes for gpus in total.split(",") if gpus):
            problem = f"cluster.slurm.options.gpus {total} is the number on all hosts, and {self.nodes} do not share it"
            advice = "equally; set cluster.slurm.gpus_per_node instead"
            raise wrong("cluster.slurm.options", f"{problem} {advice}", "cluster.slurm.nodes")
        return self

    @model_validator(mode="before")
    @classmethod
    def _removed_keys_have_no_value(cls, values: Any) -> Any:
        return without_removed(values, "cluster.slurm", _REMOVED)

    @model_validator(mode="after")
    def _there_is_time_before_the_signal(self) -> Self:
        # Slurm checks the time every half minute.
        if self.time is not None and _seconds(self.time) <= self.signal_s + 30:
            problem = f"cluster.slurm.time {self.time} leaves no time before the signal {self.signal_s} s from its end"
            advice = "raise it, or lower cluster.slurm.signal_s"
            raise wrong("cluster.slurm.time", f"{problem}; {advice}", "cluster.slurm.signal_s")
        return self

    @model_validator(mode="after")
    def _one_environment(self) -> Self:
        if self.venv is not None and self.container is not None:
            problem = "cluster.slurm has venv and container; keep one of them and set the other to null"
            raise wrong("cluster.slurm.container", problem, "cluster.slurm.venv")
        return self

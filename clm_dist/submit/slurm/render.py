"""Renders a job as a script for `sbatch`, from the templates beside this file. Asks no cluster, clock or host.

The script is simple enough for an administrator to follow: it starts `clm_dist.submit.slurm.ray_node` on each host as
a job step, runs the driver on the first host, passes signals on, and requeues itself if another attempt can help.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from clm_dist.config.job import ClusterConfig, JobConfig
from clm_dist.config.slurm import Container, Options, SlurmConfig
from clm_dist.submit.size import Hosts
from clm_dist.submit.submission import Submission

_FIELD = re.compile("@([A-Z_]+)@")
_HEAD_BY_ROUTE = r"""
# (Slurm has an address of each host. Names may resolve to nothing, and a host's own may stand for 127.0.1.1.)
address_of() {
    local node name
    node=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    for name in "$1" $node; do getent ahostsv4 "$name"; getent ahosts "$name"; done |
        awk '$1 !~ /^(127\.|::1$|fe80:)/ {print $1; exit}'
}
for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 2p) "${SLURMD_NODENAME:-$HOSTNAME}"; do
    other=$(address_of "$host")
    [ -z "$other" ] || break
done
head=$(ip route get "${other:-127.0.0.1}" 2>/dev/null | sed -n 's/.* src \([^ ]*\).*/\1/p')""".lstrip()


@dataclass(frozen=True)
class Request:
    """What a script needs in addition to the job."""

    submission: Submission
    store: str
    """Directory or URL of the prepared blocks."""
    venv: Path
    """Environment that clm-dist is installed in, unless the job names another."""
    resume: bool = False
    """Continue runs although their job has changed."""
    at_once: int | None = None
    """How many runs of a sweep may run at the same time; None means all."""


def hosts_of(cluster: ClusterConfig) -> Hosts:
    """The nodes that a job asks for."""
    slurm = cluster.slurm
    cpus = slurm.cpus_per_node or Hosts.cpus_for(cluster, slurm.nodes)
    return Hosts(cluster, slurm.nodes, slurm.num_gpus, cpus, "cluster.slurm", "node", "--nodes", "--gpus-per-node")


def render_run(job: JobConfig, request: Request) -> str:
    """The script of a job, or of a sweep whose runs all have the same script."""
    slurm, submission = job.cluster.slurm, request.submission
    options: Options = {
        "job-name": submission.name,
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": hosts_of(job.cluster).cpus,
        "gpus-per-node": slurm.gpus_request or None,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "array": _array(request) if submission.sweep else None,
        "output": _log_pattern(submission),
        "open-mode": "append",
        "requeue" if slurm.max_requeues else "no-requeue": True,
        "no-kill": job.cluster.elastic,
        "signal": f"B:USR1@{slurm.signal_s}",
        **slurm.other_options,
    }
    inside = _Inside.of(slurm, request)
    return _fill(
        "run.sh.in",
        name=submission.name,
        nodes="1 node" if slurm.nodes == 1 else f"{slurm.nodes} nodes",
        options=_option_lines(options),
        state=_state(submission),
        **_places(request),
        max_requeues=str(slurm.max_requeues),
        environment=_environment_lines(slurm, request),
        find_head=_head_by_interface(slurm.interface) if slurm.interface else _HEAD_BY_ROUTE,
        srun=" ".join(["srun --export=ALL", *(["--no-kill"] if job.cluster.elastic else []), *inside.step]),
        on_bad_exit="0" if job.cluster.elastic else "1",
        python=inside.python,
        # SLURM_JOB_ID of one task is the number of the whole array.
        job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if submission.sweep else "$SLURM_JOB_ID",
        driver=" ".join([*inside.driver, inside.python, "-m clm_dist run", *(["--resume"] if request.resume else [])]),
    )


def render_prepare(job: JobConfig, request: Request) -> str:
    """The script of the CPU job that prepares the data of a submission's runs."""
    slurm, submission = job.cluster.slurm, request.submission
    prepare = slurm.prepare
    options: Options = {
        "job-name": f"{submission.name}-prepare",
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": prepare.cpus,
        "time": prepare.time,
        "partition": prepare.partition,
        "account": prepare.account or slurm.account,
        "output": _log_pattern(submission, of_sweep=False),
        "open-mode": "append",
        "requeue": True,
        **prepare.options,
    }
    inside = _Inside.of(slurm, request)
    call = " ".join([*inside.driver, inside.python, "-m clm_dist prepare --tasks", str(prepare.cpus)])
    jobs = [shlex.quote(str(submission.files(task).job)) for task in range(len(submission.run_names))]
    return _fill(
        "prepare.sh.in",
        name=submission.name,
        options=_option_lines(options),
        **_places(request),
        environment=_environment_lines(slurm, request),
        calls="\n".join(f"{call} {job}" for job in jobs),
    )


def _fill(template: str, **fields: str) -> str:
    """The text of a template file of this directory, with each `@FIELD@` replaced by its value."""
    text = files(__package__).joinpath(template).read_text(encoding="utf-8")
    assert {name.lower() for name in _FIELD.findall(text)} == fields.keys(), template
    return _FIELD.sub(lambda match: fields[match[1].lower()], text)


@dataclass(frozen=True)
class _Inside:
    """How the script starts programs in the job's environment."""

    step: Sequence[str] = ()
    """Options of srun for the step of Ray's nodes."""
    driver: Sequence[str] = ()
    """Prefix of the driver's command."""
    python: str = "python3"

    @classmethod
    def of(cls, slurm: SlurmConfig, request: Request) -> "_Inside":
        container = slurm.container
        if container is None:
            return cls()
        image, mounts = shlex.quote(container.image), shlex.quote(",".join(_mounts(container, request)))
        if container.runtime == "apptainer":
            nv = "--nv " if slurm.num_gpus else ""
            return cls(python=f"apptainer exec {nv}--bind {mounts} {image} python3")
        # Ray and the driver share sockets in /tmp; without the mount each container has a /tmp of its own.
        options = (f"--container-image={image}", f"--container-mounts=/tmp:/tmp,{mounts}")
        # Pyxis starts containers in steps only.
        return cls(
            options, ("srun --export=ALL --overlap --nodes=1 --ntasks=1", '--nodelist="$SLURMD_NODENAME"', *options)
        )


def _mounts(container: Container, request: Request) -> Iterator[str]:
    places = [str(request.submission.runs), *([] if "://" in request.store else [request.store])]
    for mount in [*places, *container.mounts]:
        yield mount if ":" in mount else f"{mount}:{mount}"


def _array(request: Request) -> str:
    limit = f"%{request.at_once}" if request.at_once else ""
    return f"0-{len(request.submission.run_names) - 1}{limit}"


def _option_lines(options: Options) -> str:
    lines = []
    for name, value in options.items():
        if value is True:
            lines.append(f"#SBATCH --{name}")
        elif value is not None and value is not False:
            # sbatch reads quotes as a shell does, but interprets backslashes inside them too.
            lines.append(f"#SBATCH --{name}={shlex.quote(str(value).replace(chr(92), chr(92) * 2))}")
    return "\n".join(lines)


def _log_pattern(submission: Submission, *, of_sweep: bool = True) -> str:
    """The path of the log. Slurm replaces only %a, with the number of a run of a sweep."""
    root = str(submission.root).replace("%", "%%")
    return f"{root}/%a/log" if submission.sweep and of_sweep else f"{root}/log"


def _state(submission: Submission) -> str:
    root = shlex.quote(str(submission.root))
    return f"{root}/$SLURM_ARRAY_TASK_ID" if submission.sweep else root


def _places(request: Request) -> dict[str, str]:
    return {"runs": shlex.quote(str(request.submission.runs)), "store": shlex.quote(request.store)}


def _environment_lines(slurm: SlurmConfig, request: Request) -> str:
    lines = [slurm.setup.rstrip("\n")] if slurm.setup else []
    if slurm.container is None:
        lines.append(f"export PATH={shlex.quote(str(Path(slurm.venv or request.venv) / 'bin'))}:$PATH")
        problem = "clm_dist is not in this environment: set cluster.slurm.venv or setup"
        lines.append(f'python3 -c "import clm_dist" || {{ echo "{problem}"; exit 2; }}')
    return "\n".join(lines)


def _head_by_interface(interface: str) -> str:
    name = shlex.quote(interface)
    return f'head=$(ip -o addr show dev {name} | awk \'$4 !~ /^fe80:/ {{sub("/.*", "", $4); print $4; exit}}\')'

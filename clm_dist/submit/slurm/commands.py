"""The commands of Slurm: sbatch, sinfo, scontrol, scancel, and sacct if there is an accounting database."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from clm_dist.config.slurm import SlurmConfig, SlurmPart
from clm_dist.errors import ClusterAwayError, ConfigError, SubmitError
from clm_dist.submit.states import JobState

_TIMEOUT_S = 60
_REASONS = {
    "BadConstraints": "no node has what the job asks for; cancel it, and ask for less",
    "BeginTime": "it was requeued or has a begin time, and starts later",
    "Dependency": "waits for another job, such as the one that prepares",
    "DependencyNeverSatisfied": "the job that it waits for has failed; see its log, and cancel this one",
    "InvalidAccount": "the account is not valid; set cluster.slurm.account",
    "InvalidQOS": "the quality of service is not valid; set cluster.slurm.options.qos",
    "JobArrayTaskLimit": "the sweep has reached its limit of running runs (--at-once)",
    "JobHeldAdmin": "an administrator holds it",
    "JobHeldUser": "it is held; `scontrol release` releases it",
    "JobLaunchFailure": "it could not be launched, and is held; ask an administrator",
    "NodeDown": "a node that it needs is down",
    "NonZeroExitCode": "",  # the exit code says more
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition starts no jobs now",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows",
    "PartitionTimeLimit": "its time is longer than the partition allows",
    "Priority": "jobs with a higher priority wait for the same nodes",
    "QOSMaxJobsPerUserLimit": "you have reached your limit of running jobs",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "Reservation": "waits for its reservation",
    "Resources": "waits for nodes to become free",
    "launch_failed_requeued_held": "it could not be launched, and is held; `scontrol release` releases it",
    "job_requeued_in_held_state": "it was requeued and is held; `scontrol release` releases it",
}


def check_cluster(slurm: SlurmConfig, *, prepare_first: bool) -> None:
    """Ask the cluster whether it has the partitions and the GPUs of a job.

    Raises:
        ConfigError: it does not; the message lists what it has.
        SubmitError: there is no Slurm here, or it does not answer.
    """
    if shutil.which("sbatch") is None:
        raise SubmitError(
            "sbatch is not on the PATH; run this on a login node of the cluster, or see the script with --dry-run"
        )
    # A line for each partition and kind of node: its name, with a star after the default's, and the node's GPUs.
    rows = [line.split("|") for line in _ask("sinfo", "--all", "--noheader", "--format=%P|%G").splitlines()]
    parts: list[tuple[str, SlurmPart]] = [("cluster.slurm.partition", slurm)]
    parts += [("cluster.slurm.prepare.partition", slurm.prepare)] if prepare_first else []
    names = {name.rstrip("*") for name, _ in rows}
    for field, part in parts:
        for name in (part.partition or "").split(","):
            if name and name not in names:
                known = ", ".join(sorted(names))
                raise ConfigError(f"{field}: the partition {name} does not exist; there are {known}", field=field)
    # Without a partition, the site or the environment may choose any.
    wanted = slurm.partition.split(",") if slurm.partition else names
    most = max((num_gpus(gres) for name, gres in rows if name.rstrip("*") in wanted), default=0)
    if slurm.num_gpus > most:
        where = f"the partition {slurm.partition}" if slurm.partition else "this cluster"
        raise ConfigError(
            f"--gpus-per-node {slurm.num_gpus}, and a node of {where} has {most} at most; take fewer, or another "
            "partition (`sinfo -o '%P %G'` lists them)",
            field="cluster.slurm.gpus_per_node",
        )


def num_gpus(gres: str) -> int:
    """GPUs of a node, from the output of sinfo: `gpu:a100:4(S:0-1),gpu:v100:2` has 6."""
    return sum(int(count) for count in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres))


# Variables of sbatch that have other names than the options of a script, or contradict what the script relies on.
_OVERRULING = {
    *("SBATCH_ARRAY_INX", "SBATCH_ERROR", "SBATCH_GPUS", "SBATCH_GPUS_PER_TASK", "SBATCH_NO_KILL", "SBATCH_NO_REQUEUE"),
    *("SBATCH_REQUEUE", "SBATCH_TIMELIMIT", "SBATCH_WAIT"),
}


def submit_script(script: Path, *options: str) -> str:
    """Queue a script, and return the job's number. Raises SubmitError with the output of sbatch."""
    own = set(re.findall(r"^#SBATCH --([a-z0-9-]+)", script.read_text(encoding="utf-8"), flags=re.MULTILINE))
    said = _ask("sbatch", "--parsable", *options, str(script), environment=_environment(own))
    if not (number := re.fullmatch(r"(\d+)(;.*)?", said.strip())):
        raise SubmitError(f"sbatch did not print the number of a job, but: {said.strip() or 'nothing'}")
    return number[1]


def _environment(options: set[str]) -> dict[str, str]:
    """The environment of this process, without variables that would override the options of a script."""
    # In a job, such as an interactive one, SLURM_* describe that job. SBATCH_* override the options of the script.
    names = {f"SBATCH_{name.upper().replace('-', '_')}" for name in options} | _OVERRULING
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    return {k: v for k, v in os.environ.items() if k in kept or not (k.startswith("SLURM_") or k in names)}


def job_states(job_id: str) -> dict[str, JobState]:
    """The state of a job by its number; for an array, the state of each task (`12_0`, ...).

    Empty if Slurm does not know the job any more.

    Raises:
        SubmitError: Slurm does not answer.
    """
    try:
        # Without it, Slurm cuts the list of an array's tasks at 64 characters.
        whole = {**os.environ, "SLURM_BITSTR_LEN": "0"}
        text = _ask("scontrol", "show", "job", "--oneliner", job_id, environment=whole)
    except SubmitError as error:
        if "Invalid job id" not in str(error):
            raise
        return _accounted_states(job_id)
    states = {}
    for line in text.splitlines():
        values = dict(re.findall(r"(?<!\S)(\w+)=(\S*)", line)[::-1])  # keep the first of names that come twice
        state = _job_state(values)
        if "ArrayJobId" in values:
            # One line holds all tasks that wait: 0-2,5%4.
            for task in _expand(values["ArrayTaskId"]):
                states[f"{values['ArrayJobId']}_{task}"] = state
        elif "JobId" in values:
            states[values["JobId"]] = state
    return states


def cancel_job(job_id: str) -> None:
    """Cancel a job. Raises SubmitError if Slurm refuses."""
    _ask("scancel", job_id)


def release_job(job_id: str) -> None:
    """Release a job that was queued with --hold. Raises SubmitError if Slurm refuses."""
    _ask("scontrol", "release", job_id)


def _job_state(values: Mapping[str, str]) -> JobState:
    state = values["JobState"]
    reason = values.get("Reason", "None")
    left = None
    if state == "RUNNING" and re.fullmatch(r"\d{4}-[-\dT:]+", values.get("EndTime", "")):
        left = time.mktime(time.strptime(values["EndTime"], "%Y-%m-%dT%H:%M:%S")) - time.time()
    nodes = values.get("NodeList", "")
    code, _, number = values.get("ExitCode", "0:0").partition(":")
    ended = f"exit code {code}" if code != "0" else f"signal {number}" if number != "0" else ""
    return JobState(
        state,
        describe_reason(reason) or ("" if JobState(state).active else ended),
        "" if nodes == "(null)" else nodes,
        int(values.get("Restarts", 0)),
        left,
    )


def describe_reason(reason: str) -> str:
    """Why a job waits, in words; Slurm's own name for a reason without words, and empty if Slurm gives none."""
    name = re.split(r"[(,:]", reason)[0]
    if name in ("None", ""):
        return ""
    if name in _REASONS:
        return _REASONS[name]
    if name.startswith("QOS"):
        return f"a limit of the quality of service ({reason})"
    if name.startswith(("Assoc", "Max")):
        return f"a limit of your account ({reason})"
    return reason


def _accounted_states(job_id: str) -> dict[str, JobState]:
    """The states of a job in the accounting database, if the cluster has one."""
    try:
        fields = "JobID,State,ExitCode,NodeList"
        text = _ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", f"--format={fields}")
    except SubmitError:
        return {}
    states = {}
    for line in text.splitlines():
        number, state, code, nodes = line.split("|")
        word = state.split()[0]
        reason = "" if code.startswith("0:") else f"exit code {code.partition(':')[0]}"
        states[number] = JobState(word, reason, "" if nodes == "None assigned" else nodes)
    return states


def _expand(tasks: str) -> list[int]:
    """`0-2,5%4` as 0, 1, 2, 5, and `0-4:2` as 0, 2, 4."""
    found: list[int] = []
    for part in tasks.partition("%")[0].split(","):
        ends, _, step = part.partition(":")
        first, _, last = ends.partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return found


def _ask(program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    command: Sequence[str] = (program, *arguments)
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment)
    except FileNotFoundError:
        raise SubmitError(f"{program} is not on the PATH; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        problem = f"{program} did not answer within {_TIMEOUT_S} s"
        raise ClusterAwayError(
            f"{problem}; is the Slurm controller up? `squeue --me` shows the jobs that it accepted"
        ) from None
    if ended.returncode:
        said = (ended.stderr + ended.stdout).strip() or f"exit code {ended.returncode}"
        away = "Unable to contact slurm controller" in said
        raise (ClusterAwayError if away else SubmitError)(f"{program} refused: {said}")
    return ended.stdout

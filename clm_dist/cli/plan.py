"""The command that says what a job takes: `plan`."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from clm_dist.against_plan import ANY_GPU, why_of_another_job
from clm_dist.cli.complete import complete_run
from clm_dist.cli.options import DEFAULT_RUNS, JobFile, Overrides, Runs, StoreOption, open_stores
from clm_dist.cli.streams import unfailing
from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job, located
from clm_dist.config.paths import local_dir
from clm_dist.devices import DEVICES, Device
from clm_dist.errors import ConfigError
from clm_dist.files.plan_file import PlanFile, make_room, write_plan
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import DEFAULT_STORES, Stores
from clm_dist.plan.target import Target
from clm_dist.progress import err, out

_GIB = 2**30
_NODES = (1, 2, 4, 8)
_NETWORK_GBIT = 100.0
_BYTES_PER_GBIT = 1e9 / 8
_OF_BASIS = ("data", "tokenizer", "model")
"""Sections on which the blocks and the architecture of a job depend."""


def plan(
    job_file: JobFile,
    overrides: Overrides = None,
    stores: StoreOption = DEFAULT_STORES,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help=f"GPU: {', '.join(device.name for device in DEVICES)}.")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option("--memory-gib", min=0.1, help="Memory of a GPU, instead of that of --gpu.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option("--tflops", min=0.01, help="Dense peak of a GPU in the job's precision.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, help="GPUs of a node.", show_default="the job's, or 8")
    ] = None,
    nodes: Annotated[
        str | None, typer.Option("--nodes", help="Numbers of nodes to compare: 1,2,4,8.", show_default="1,2,4,8")
    ] = None,
    network: Annotated[
        float, typer.Option("--network", min=0.001, help="Gbit/s of a node to others, in one direction.")
    ] = _NETWORK_GBIT,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Price of a GPU for an hour.")] = None,
    mfu: Annotated[
        str | None, typer.Option("--mfu", help="Share of the peak that training reaches: 0.4, or 0.3-0.5.")
    ] = None,
    probe: Annotated[
        float | None,
        typer.Option("--probe", min=1, metavar="SECONDS", help="Measure the speed on this machine for about so long."),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            autocompletion=complete_run,
            help="Take the speed from a run that is finished or trains, such as one on a subset.",
        ),
    ] = None,
    losses: Annotated[
        list[Path] | None,
        typer.Option(
            "--losses",
            metavar="RUN",
            autocompletion=complete_run,
            help="Take the eval loss to expect from runs that are done on parts of the data; name two or more.",
        ),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the plan in the directory of its run, for `report` and `status`.")
    ] = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a job takes before it is run: memory, strategy, time, cost, disk."""
    from clm_dist.plan.basis import basis_of
    from clm_dist.plan.page import plan_values, print_plan
    from clm_dist.plan.plan import make_plan
    from clm_dist.plan.saved import plan_file

    speeds = [name for name, value in (("--mfu", mfu), ("--probe", probe), ("--from", run_dir)) if value is not None]
    if len(speeds) > 1:
        raise ConfigError(f"{' and '.join(speeds)} say where the speed is from; leave all but one of them out")
    for name, value in (("--price", price), ("--memory-gib", memory_gib), ("--tflops", tflops), ("--network", network)):
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{name} {value} is not a number that can be reckoned with")
    job = load_job(job_file, overrides or ())
    config = job.config
    run = RunDir(local_dir(runs, "--runs") / config.name) if save else None
    device, share = _device(gpu, memory_gib, tflops), _share(mfu)
    between_nodes = network * _BYTES_PER_GBIT
    with located(job):
        basis = basis_of(config, open_stores(stores))
        counts, architecture, notes = basis.counts, basis.architecture, list(basis.notes)
        if run is not None:
            # Before the speed is measured, which may take long.
            make_room(run)
        measured = None
        if run_dir is not None:
            from clm_dist.plan.from_run import speed_of_run

            measured = speed_of_run(run_dir, config, architecture, device, between_nodes)
        elif probe is not None:
            from clm_dist.plan.probing import probe_speed

            measured = probe_speed(config, architecture, counts, probe, device)
        loss = None
        if losses:
            from clm_dist.plan.loss_of_runs import loss_of_runs

            loss, said = loss_of_runs(losses, config, counts)
            notes += said
        target = Target(
            device=device or (measured.device if measured else None),
            gpus_per_node=gpus_per_node or (measured.workers_per_node if measured else _gpus_of(config)),
            nodes=_numbers(nodes) if nodes else ((1,) if measured else _NODES),
            between_nodes=between_nodes,
            price=price,
            is_other_gpu=measured is not None and measured.is_gpu,
        )
        made = make_plan(
            config,
            architecture,
            counts,
            target,
            speed=measured.speed if measured else None,
            mfu=share,
            loss=loss,
            notes=[*notes, *(measured.notes if measured else ())],
        )
    with unfailing("stdout"):
        if as_json:
            typer.echo(json.dumps(plan_values(made), indent=2, allow_nan=False))
        else:
            print_plan(made, target, out)
    if run is not None:
        write_plan(run, plan_file(config, made, target, measured))
        _say_saved(run)


def _say_saved(run: RunDir) -> None:
    said = f"the plan is in {run.plan}; `clm-dist report {shlex.quote(str(run.root))}` shows it beside what came"
    if run.exists() and (why := why_of_another_job(run)):
        said += f"\nnote: there is already a run in {run.root}: {why}"
    err.print(said, markup=False, highlight=False, soft_wrap=True)


def plan_for_hosts(
    jobs: Sequence[JobConfig], stores: Stores, gpu: str, *, nodes: int, gpus_per_node: int
) -> list[PlanFile]:
    """The plan of each job of a submission on the hosts that it asks for; the first is printed on standard error.

    Args:
        gpu: name of a GPU that is known.
        gpus_per_node: 0 where that is not known.
    """
    from clm_dist.plan.basis import Basis, basis_of
    from clm_dist.plan.page import print_plan
    from clm_dist.plan.plan import make_plan
    from clm_dist.plan.saved import plan_file

    device = _device(gpu, None, None)
    bases: list[tuple[JobConfig, Basis]] = []
    plans: list[PlanFile] = []
    for job in jobs:
        # Most sweeps change neither the blocks nor the model.
        same = (basis for other, basis in bases if all(getattr(other, n) == getattr(job, n) for n in _OF_BASIS))
        if (basis := next(same, None)) is None:
            basis = basis_of(job, stores)
            bases.append((job, basis))
        each = gpus_per_node or -(-job.cluster.max_workers // nodes)
        target = Target(device, each, (nodes,), _NETWORK_GBIT * _BYTES_PER_GBIT)
        made = make_plan(job, basis.architecture, basis.counts, target, notes=basis.notes)
        if not plans:
            print_plan(made, target, err)
        plans.append(plan_file(job, made, target))
    return plans


def _device(name: str | None, memory_gib: float | None, tflops: float | None) -> Device | None:
    """The GPU that the options describe."""
    known = {device.name: device for device in DEVICES}
    if name is not None and name.lower() not in known:
        raise ConfigError(
            f"the GPU {name} is not known; take one of {', '.join(known)}, or say `clm-dist plan` its --memory-gib and "
            "--tflops"
        )
    if name is None and (memory_gib is None or tflops is None):
        if memory_gib is None and tflops is None:
            return None
        missing = "--tflops" if tflops is None else "--memory-gib"
        raise ConfigError(f"a GPU needs --memory-gib and --tflops, or --gpu with its name; {missing} is missing")
    device = known[name.lower()] if name else Device(ANY_GPU, (), 0, 0, 0, 32e9)
    if memory_gib is not None:
        device = replace(device, memory_bytes=memory_gib * _GIB)
    if tflops is not None:
        # Whatever the precision of the job is.
        device = replace(device, half_flops=tflops * 1e12, single_flops=tflops * 1e12, tf32_flops=tflops * 1e12)
    return device


def _gpus_of(job: JobConfig) -> int:
    """GPUs of a node that a job names for a cluster."""
    return job.cluster.slurm.num_gpus or job.cluster.k8s.gpus_per_pod or 8


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--nodes {text} is not a list of numbers; write 1,2,4,8")
    return tuple(sorted(set(numbers)))


def _share(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, _, high = text.partition("-")
        share = float(low), float(high or low)
    except ValueError:
        share = (0.0, 0.0)
    if not 0 < share[0] <= share[1] <= 1:
        raise ConfigError(f"--mfu {text} is not a share of the peak; write 0.4, or 0.3-0.5")
    return share

"""A speed from a run that is finished, or that still trains."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from clm_dist.config.job import JobConfig
from clm_dist.config.load import read_saved_job
from clm_dist.devices import Device, device_of
from clm_dist.errors import ConfigError
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.plan.architecture import Architecture
from clm_dist.plan.duration import Network, step_time, token_flops
from clm_dist.plan.families import architecture_of
from clm_dist.plan.memory import Setting
from clm_dist.plan.model import model_architecture, read_config
from clm_dist.plan.speed import Measured, Speed, check_measured_on, measure
from clm_dist.plan.target import MeasuredSpeed
from clm_dist.quantities import show_bytes

_SAME_SPEED = (
    ("train", ("precision", "compile", "gradient_checkpointing")),
    ("model", ("attention",)),
    ("batch", ("micro_size",)),
    ("data", ("block_size", "document_mask")),
    ("cluster", ("strategy", "offload", "cpus_per_worker")),
)
"""Fields on which the speed of a worker depends."""
_SAME_MEMORY = (("train", ("optimizer", "optimizer_options")), ("eval", ("micro_size",)))
"""Fields on which its memory depends as well."""


def measured_run(path: Path) -> tuple[JobConfig, Measured]:
    """The job of a run, and the speed of it.

    Raises:
        ConfigError: there is no run, or it has not trained enough to tell.
    """
    run = RunDir(path)
    if not run.exists():
        raise ConfigError(f"--from {path} is no run directory; name one that `clm-dist run` wrote")
    measured = measure(read_records(run.metrics))
    if measured is None:
        raise ConfigError(f"--from {path} has trained too few steps to tell its speed; wait, or name another run")
    return read_saved_job(run.job), measured


def speed_of_run(
    path: Path,
    job: JobConfig,
    model: Architecture,
    device: Device | None,
    between_nodes: float,
) -> MeasuredSpeed:
    """The speed that a worker has in a job, from that of another run.

    Arithmetic goes with the operations of a token, and from one GPU to another with their peaks. What workers wait for
    each other is computed, and taken out.

    Raises:
        ConfigError: see `measured_run`; or the run was on a CPU, and a GPU is asked for.
    """
    old, measured = measured_run(path)
    own = device_of(measured.device)
    check_measured_on(measured.device, device)
    changed = list(_changed(old, job, _SAME_SPEED))
    notes = [f"{field} is {was}, and {now} here: the speed is taken to be the same" for field, was, now in changed]
    before = _architecture_of_run(path, old, job, model)
    factor = token_flops(before, old.data.block_size) / token_flops(model, job.data.block_size)
    if device is not None and own is not None and device != own:
        factor *= device.peak_flops(job.train.precision) / own.peak_flops(old.train.precision)
        notes.append(f"the run was on {own.name}: its speed is scaled by the peaks of the two")
    elif device is not None and own is None:
        notes.append(
            f"the run was on {measured.device}, which is not known here: its speed is not scaled to {device.name}"
        )
    if measured.memory_bytes is not None:
        notes.append(f"the worker of rank 0 took {show_bytes(measured.memory_bytes)} in that run")
    alone = _without_waiting(measured, old, before, own, between_nodes)
    evaluated = None
    if measured.eval_seconds is not None:
        seconds, predicted = measured.eval_seconds
        size = old.data.block_size
        evaluated = predicted * size / (size - 1) / seconds / measured.workers * factor
    # Of another model or another pass the run says neither how many blocks fit nor what they take.
    is_same = before == model and not changed
    has_its_memory = is_same and not any(_changed(old, job, _SAME_MEMORY))
    speed = Speed(
        low=measured.low * alone * factor,
        high=measured.high * alone * factor,
        how=f"measured in {measured.num_steps:,} steps of {path}, on {measured.workers} x {measured.device}",
        eval_tokens_per_s=evaluated,
        start_s=measured.start_s,
        memory_bytes=measured.memory_bytes if has_its_memory else None,
        micro_size=measured.micro_size if is_same and device in (None, own) else None,
    )
    return MeasuredSpeed(
        speed=speed,
        device=own,
        is_gpu=measured.device != "CPU",
        name=measured.device,
        workers=measured.workers,
        workers_per_node=-(-measured.workers // measured.num_hosts),
        notes=tuple(notes),
    )


def _changed(
    old: JobConfig, new: JobConfig, fields: Iterable[tuple[str, tuple[str, ...]]]
) -> Iterator[tuple[str, object, object]]:
    """Name and values of each of some fields that differ in two jobs."""
    for section, names in fields:
        for name in names:
            was, now = (getattr(getattr(job, section), name) for job in (old, new))
            if was != now:
                yield f"{section}.{name}", was, now


def _architecture_of_run(path: Path, old: JobConfig, job: JobConfig, model: Architecture) -> Architecture:
    if old.model == job.model and old.tokenizer == job.tokenizer:
        return model
    final = RunDir(path).final
    if (final / "config.json").is_file() and (found := architecture_of(read_config(str(final), None))):
        return found
    return model_architecture(old, model.vocabulary)[0]


def _without_waiting(
    measured: Measured, job: JobConfig, model: Architecture, device: Device | None, between_nodes: float
) -> float:
    """How much faster a worker is that waits for no other, as a factor."""
    if device is None or measured.workers == 1:
        return 1.0
    if measured.micro_size:
        job = job.with_micro_size(measured.micro_size)
    setting = Setting.of_job(job, measured.workers, is_gpu=True)
    network = Network(-(-measured.workers // measured.num_hosts), device.link, between_nodes)
    # The time of a step is known, so what is computed is what is left of it without the waiting.
    step = setting.blocks_of_step * setting.block_size / ((measured.low + measured.high) / 2)
    low, high = 1.0, 100.0
    for _ in range(50):
        factor = (low + high) / 2
        rate = factor * (measured.low + measured.high) / 2
        low, high = (factor, high) if step_time(model, setting, rate, network).total > step else (low, factor)
    return (low + high) / 2

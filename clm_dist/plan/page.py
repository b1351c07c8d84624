"""A plan as text for a terminal, and as values for JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from clm_dist.plan.counts import Count
from clm_dist.plan.loss import SEED_ERROR, Estimate
from clm_dist.plan.loss_of_runs import LossOfRuns
from clm_dist.plan.plan import Plan, Scale
from clm_dist.plan.target import Target
from clm_dist.quantities import show_bytes, show_number, show_range, show_time

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "copies": "half-precision copies",
    "activations": "activations",
    "loss": "logits and loss",
    "buffers": "buffers",
    "context": "CUDA context",
}


_SEEDS = f""", and if another seed changes the loss by {SEED_ERROR} nats;
        to see what it changes, run the smallest part again with another train.seed, and name it too"""


def print_plan(plan: Plan, target: Target, console: Console) -> None:
    """Print a plan, at any width from 80 columns on."""
    for line in _lines(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    setting, workers = plan.setting, f"{plan.workers} worker{'s' * (plan.workers > 1)}"
    blocks = f"{setting.micro_size} block{'s' * (setting.micro_size > 1)}"
    where = target.device.name if target.device else "a GPU" if target.is_gpu else "a worker, on a CPU"
    _print_table(
        f"memory of {where}: {setting.strategy} on {workers}, {blocks} a pass, {setting.precision}",
        _own_memory(plan, target),
        console,
    )
    _print_table(
        f"strategies on {workers}: memory, and what the host needs for each worker", _strategies(plan), console
    )
    console.print(plan.advice, markup=False, highlight=False, soft_wrap=True)
    if plan.scales:
        _print_table("nodes: the whole run, evaluations with it", _scales(plan, target), console)
    for line in _ends(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_table(title: str, table: Table, console: Console) -> None:
    # As a line, because the title of a table is as narrow as the table.
    console.print(f"\n{title}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def plan_values(plan: Plan) -> dict[str, Any]:
    """A plan as JSON has it: bytes, seconds, tokens a second; intervals are from and to."""
    values = asdict(plan)
    for choice, made in zip(values["choices"], plan.choices, strict=True):
        choice["memory"]["total"] = made.memory.total
    values["disk"]["total"] = plan.disk.total
    return values


def _lines(plan: Plan) -> Iterator[str]:
    model, counts = plan.architecture, plan.counts
    yield f"{plan.name}: {model.family}, {plan.num_parameters:,} parameters"
    yield (
        f"data:   {_blocks(counts.train)} train and {_blocks(counts.eval)} eval blocks of "
        f"{plan.setting.block_size} tokens, {counts.how}"
    )
    yield (
        f"steps:  {plan.steps:,} ({plan.steps_per_epoch:,} an epoch), {show_number(plan.tokens)} tokens, "
        f"{plan.evaluations:,} evaluations"
    )


def _ends(plan: Plan) -> Iterator[str]:
    disk = plan.disk
    if plan.speed is not None:
        yield f"speed:  {show_range(plan.speed.low, plan.speed.high, show_number)} tokens/s a worker: {plan.speed.how}"
    if plan.too_many:
        hosts = ", ".join(map(str, plan.too_many))
        yield f"        {hosts} nodes have more workers than a step has micro-batches; raise batch.global_size"
    yield (
        f"disk:   {show_bytes(disk.total)}: blocks {show_bytes(disk.store + disk.while_preparing)}, checkpoints "
        f"{show_bytes(disk.checkpoints)} (each {show_bytes(disk.checkpoint)}), model {show_bytes(disk.model)}"
    )
    if plan.loss is not None:
        yield from _loss_lines(plan.loss)
    for note in plan.notes:
        yield f"note:   {note}"


def _loss_lines(loss: LossOfRuns) -> Iterator[str]:
    if (expected := loss.expected) is None:
        return
    epochs = "an epoch" if loss.epochs == 1 else f"{loss.epochs:.3g} epochs"
    perplexity = _estimate(expected.perplexity, ",.4g")
    trained = f"{epochs} of {loss.blocks:,.0f} blocks"
    yield f"loss:   {_estimate(expected.loss, '.3f')}, perplexity {perplexity} after {trained};"
    times = loss.tokens.value / loss.points[-1].tokens
    runs = f"{len(loss.points)} runs"
    yield f"        95 % interval of a power law through {runs}, at {times:.3g} times the tokens of the largest;"
    yield f"        it holds if the rest of the data is like theirs{'' if loss.has_seeds else _SEEDS}"


def _estimate(value: Estimate, spec: str) -> str:
    return f"{value.value:{spec}} ({value.low:{spec}} to {value.high:{spec}})"


def _own_memory(plan: Plan, target: Target) -> Table:
    own = next(one for one in plan.choices if one.is_of(plan.setting))
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, title in _PARTS.items():
        if value := getattr(own.memory, name):
            table.add_row(title, show_bytes(value))
    table.add_row("at most at once", show_bytes(own.memory.total), end_section=True)
    if target.device:
        table.add_row(f"of {target.device.name}", show_bytes(target.device.memory_bytes))
    return table


def _strategies(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAVY)
    for column in ("strategy", "offload", "memory", "recomputed", "host", "most blocks"):
        table.add_column(column, justify="left" if column in ("strategy", "offload") else "right")
    kept = [one for one in plan.choices if not one.gradient_checkpointing]
    recomputed = {(one.strategy, one.offload): one for one in plan.choices if one.gradient_checkpointing}
    for one in kept:
        other = recomputed[one.strategy, one.offload]
        most = "-" if one.most_blocks is None else f"{one.most_blocks:,} / {other.most_blocks:,}"
        marks = [f"{show_bytes(each.memory.total)}{' !' if each.fits is False else ''}" for each in (one, other)]
        is_own = (one.strategy, one.offload) == (plan.setting.strategy, plan.setting.offload)
        table.add_row(f"{one.strategy}{' *' if is_own else ''}", one.offload, *marks, show_bytes(one.host_bytes), most)
    table.caption = "* the job's own; recomputed: with train.gradient_checkpointing; !: does not fit"
    table.caption_justify = "left"
    return table


def _scales(plan: Plan, target: Target) -> Table:
    table = Table(box=box.SIMPLE_HEAVY)
    hours = "GPU-hours" if target.is_gpu else "worker-hours"
    columns = ["nodes", "workers", "tokens/s", "waiting", "time", hours]
    columns += ["cost"] if target.price is not None else []
    for column in columns:
        table.add_column(column, justify="right")
    for scale in plan.scales:
        table.add_row(*_scale_cells(scale))
    if any(scale.fits is False for scale in plan.scales):
        table.caption, table.caption_justify = "!: does not fit", "left"
    return table


def _scale_cells(scale: Scale) -> Iterator[str]:
    yield f"{scale.nodes}"
    yield f"{scale.workers}{' !' if scale.fits is False else ''}"
    yield show_number(scale.tokens_per_s)
    yield f"{scale.waiting * 100:.0f} %"
    yield show_range(*scale.seconds, show_time)
    yield show_range(*scale.gpu_hours, lambda hours: f"{hours:,.1f}")
    if scale.cost is not None:
        yield show_range(*scale.cost, lambda cost: f"{cost:,.2f}")


def _blocks(count: Count) -> str:
    if count.low == count.high:
        return f"{count.blocks:,.0f}"
    return f"{count.blocks:,.0f} ({count.low:,.0f} to {count.high:,.0f})"

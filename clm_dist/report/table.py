"""A run's result as a table for the terminal, and several runs' results side by side."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from rich import box
from rich.table import Table

from clm_dist.checkpoints import Checkpoints, best_of
from clm_dist.errors import ConfigError
from clm_dist.run_dir import RunDir, damaged, read_json

Result = dict[str, Any]
COLUMNS = ("evaluation", "step", "epoch", "loss", "perplexity", "change", "bits per byte")


class _Evaluation(BaseModel):
    step: int
    epoch: float
    loss: float
    perplexity: float | None
    bits_per_byte: float | None
    num_tokens: int


class _Training(BaseModel):
    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float | None


class _Hardware(BaseModel):
    device: str | None
    machine: str
    cpus: int | None


class _Result(BaseModel):
    """What result.json must have for a report; more is fine."""

    name: str
    status: str
    baseline: _Evaluation | None
    evals: list[_Evaluation]
    final: _Evaluation | None
    train: _Training
    workers: int
    strategy: str
    restarts: int
    data: str
    versions: dict[str, str]
    hardware: _Hardware
    finished: str


def read_result(path: Path) -> Result:
    """The result of a run directory. Raises ConfigError where there is none, or only a part of one."""
    run = RunDir(path)
    if not run.exists() and run.result.is_file():
        raise ConfigError(f"{run.job} is missing; restore it, or train again with --overwrite")
    if not run.result.is_file():
        reason = "has no result yet" if run.exists() else "is no run directory"
        raise ConfigError(f"{path} {reason}; name a directory that `clm-dist run` wrote, for example runs/quickstart")
    result: Result = read_json(run.result)
    try:
        _Result.model_validate(result)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise damaged(run.result, f"{where}: {problem['msg']}" if where else problem["msg"]) from None
    return result


def rows(result: Result) -> list[tuple[str, ...]]:
    """The cells of a run's evaluations under COLUMNS: baseline, every one in between, final."""
    named = [("baseline", result["baseline"])] if result["baseline"] else []
    evals = result["evals"]
    for number, evaluation in enumerate(evals):
        last = number == len(evals) - 1 and result["final"] is not None
        epoch = evaluation["epoch"]
        named.append(("final" if last else f"epoch {epoch:.3g}", evaluation))
    return [
        (
            name,
            str(evaluation["step"]),
            f"{evaluation['epoch']:.2f}",
            f"{evaluation['loss']:.4f}",
            show(evaluation["perplexity"], ".2f"),
            change(result["baseline"], evaluation),
            show(evaluation["bits_per_byte"], ".4f"),
        )
        for name, evaluation in named
    ]


def result_table(result: Result) -> Table:
    """Baseline, every evaluation and the final one."""
    table = Table(title=f"{result['name']}: {result['status']}", box=box.SIMPLE_HEAVY, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "evaluation" else "right")
    for cells in rows(result):
        table.add_row(*cells)
    return table


def checkpoint_table(checkpoints: Checkpoints) -> Table | None:
    """The committed checkpoints of a run, the newest last; None where there is none."""
    names = checkpoints.committed()
    if not names:
        return None
    table = Table(title=f"Checkpoints in {checkpoints.root}", box=box.SIMPLE_HEAVY, title_justify="left")
    for column in ("checkpoint", "step", "saved", "MiB", "workers", "strategy", "eval loss", ""):
        table.add_column(column, justify="left" if column in ("checkpoint", "strategy", "") else "right")
    markers = checkpoints.readable()
    best = best_of(markers)
    for name in names:
        if name not in markers:
            table.add_row(name, *[""] * 6, "of another version, or damaged")
            continue
        marker = markers[name]
        notes = ["resumed from"] * (name == names[-1]) + ["best"] * (name == best)
        table.add_row(
            name,
            str(marker.state.step),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(marker.time)),
            f"{marker.num_bytes / 2**20:,.1f}",
            str(marker.state.world_size),
            marker.state.strategy,
            show(marker.eval_loss, ".4f"),
            ", ".join(notes),
        )
    return table


def comparison_table(results: Sequence[Result]) -> Table:
    """One row a run."""
    table = Table(title="Runs", box=box.SIMPLE_HEAVY, title_justify="left")
    table.add_column("run", overflow="fold")
    columns = (
        "status",
        "data",
        "workers",
        "strategy",
        "steps",
        "tokens/s",
        "baseline",
        "perplexity",
        "change",
        "bits per byte",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("status", "data", "strategy") else "right", no_wrap=True)
    for result in results:
        last = result["final"] or (result["evals"] or [None])[-1] or {}
        table.add_row(
            result["name"],
            result["status"],
            result["data"][:8],
            str(result["workers"]),
            result["strategy"],
            str(result["train"]["steps"]),
            show(result["train"]["tokens_per_s"], ",.0f"),
            show((result["baseline"] or {}).get("perplexity"), ".2f"),
            show(last.get("perplexity"), ".2f"),
            change(result["baseline"], last) if last else "-",
            show(last.get("bits_per_byte"), ".4f"),
        )
    return table


def comparability(results: Sequence[Result]) -> str | None:
    """What a reader must know before comparing perplexities; None where the runs share their blocks."""
    if len({result["data"] for result in results}) == 1:
        return None
    return (
        "These runs were evaluated on different blocks (see the column data): their perplexities are not comparable; "
        "bits per byte are, where the eval text is the same."
    )


def show(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def change(first: dict[str, Any] | None, evaluation: dict[str, Any]) -> str:
    """How much the perplexity fell since the baseline: `-84.1 %`, or `÷ 12.3` where it fell tenfold."""
    if not first or not first["perplexity"] or not evaluation.get("perplexity") or first is evaluation:
        return ""
    ratio = first["perplexity"] / evaluation["perplexity"]
    return f"÷ {ratio:.1f}" if ratio >= 10 else f"{(1 / ratio - 1) * 100:+.1f} %"

"""A run's result as a table for the terminal, and several runs' results side by side."""

import time

from rich import box
from rich.table import Table

from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.markers import best_of
from clm_dist.files.result import Result
from clm_dist.metrics import EvalFigures

COLUMNS = ("evaluation", "step", "epoch", "loss", "perplexity", "change", "bits per byte")


def rows(result: Result) -> list[tuple[str, ...]]:
    """The cells of a run's evaluations under COLUMNS: baseline, every one in between, final."""
    named = [("baseline", result["baseline"])] if result["baseline"] else []
    evals = result["evals"]
    for evaluation in evals:
        is_final = result["final"] is not None and evaluation["step"] == result["final"]["step"]
        name = f"epoch {evaluation['epoch']:.3g}"
        if is_final:
            # With train.keep best others may follow.
            name = "final" if evaluation is evals[-1] else f"{name}, final"
        named.append((name, evaluation))
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
    table = Table(title=f"{result['name']}: {describe_status(result)}", box=box.SIMPLE_HEAVY, title_justify="left")
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


def describe_status(result: Result) -> str:
    """How a run ended; whether one that has not ended still runs is not known from its records."""
    return "not finished" if result["status"] == "running" else result["status"]


def show(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def change(first: EvalFigures | None, evaluation: EvalFigures) -> str:
    """How much the perplexity fell since the baseline: `-84.1 %`, or `÷ 12.3` where it fell tenfold."""
    if not first or not first["perplexity"] or not evaluation["perplexity"] or first is evaluation:
        return ""
    ratio = first["perplexity"] / evaluation["perplexity"]
    return f"÷ {ratio:.1f}" if ratio >= 10 else f"{(1 / ratio - 1) * 100:+.1f} %"

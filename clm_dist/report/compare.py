"""Several runs' results side by side."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from clm_dist.files.result import Result, last_figures
from clm_dist.report.table import change, show


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
        baseline, last = result["baseline"], last_figures(result)
        table.add_row(
            result["name"],
            result["status"],
            result["data"][:8],
            str(result["workers"]),
            result["strategy"],
            str(result["train"]["steps"]),
            show(result["train"]["tokens_per_s"], ",.0f"),
            show(baseline and baseline["perplexity"], ".2f"),
            show(last and last["perplexity"], ".2f"),
            change(baseline, last) if last else "-",
            show(last and last["bits_per_byte"], ".4f"),
        )
    return table


def comparability(results: Sequence[Result]) -> str | None:
    """A warning for readers who compare perplexities; None if the runs have the same blocks."""
    if len({result["data"] for result in results}) == 1:
        return None
    return (
        "These runs were evaluated on different blocks (see the column data): their perplexities are not comparable; "
        "bits per byte are, where the eval text is the same."
    )

"""Several runs side by side: the figures as a table for a terminal, and what makes them comparable."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from clm_dist.files.result import Result, last_figures
from clm_dist.report.table import change, describe_status, show

_TEXTS = ("status", "data", "strategy")
# What a narrow terminal does without, in this order.
_EXPENDABLE = ("data", "strategy", "workers", "baseline", "tokens/s", "steps", "bits per byte", "status", "change")
_MOST_NAME = 40
_GAP = 3
"""Between two columns of a table."""


def labels_of(paths: Sequence[Path], results: Sequence[Result]) -> list[str]:
    """What the runs are called: their names, or where two have the same name their directories."""
    names = [result["name"] for result in results]
    return names if len(set(names)) == len(names) else list(map(str, paths))


def figures_of(results: Sequence[Result]) -> Mapping[str, list[str]]:
    """The figures of runs by the name of the figure, a cell for each run."""
    figures: dict[str, list[str]] = {}
    for result in results:
        baseline, last = result["baseline"], last_figures(result)
        for name, cell in (
            ("status", describe_status(result)),
            ("data", result["data"][:8]),
            ("workers", str(result["workers"])),
            ("strategy", result["strategy"]),
            ("steps", str(result["train"]["steps"])),
            ("tokens/s", show(result["train"]["tokens_per_s"], ",.0f")),
            ("baseline", show(baseline and baseline["perplexity"], ".2f")),
            ("perplexity", show(last and last["perplexity"], ".2f")),
            ("change", change(baseline, last) if last else "-"),
            ("bits per byte", show(last and last["bits_per_byte"], ".4f")),
        ):
            figures.setdefault(name, []).append(cell)
    return figures


def comparison_table(labels: Sequence[str], results: Sequence[Result], width: int) -> Table:
    """One row a run, with whole names.

    Args:
        width: columns of the terminal; figures that are equal in all runs are below the table where it is too narrow,
            and then the least telling ones are left out.
    """
    figures = dict(figures_of(results))
    notes = []

    def needed() -> int:
        columns = [min(_MOST_NAME, max(map(len, ("run", *labels))))]
        columns += [max(map(len, (column, *cells))) for column, cells in figures.items()]
        return sum(size + _GAP for size in columns) + 1

    if needed() > width:
        equal = {name: cells[0] for name, cells in figures.items() if len(set(cells)) == 1 and name in _EXPENDABLE}
        figures = {name: cells for name, cells in figures.items() if name not in equal}
        if equal:
            notes.append(f"The same in all: {', '.join(f'{name} {cell}' for name, cell in equal.items())}.")
    left_out = []
    for name in _EXPENDABLE:
        if name in figures and needed() > width:
            del figures[name]
            left_out.append(name)
    if left_out:
        notes.append(f"Left out, as the terminal is narrow: {', '.join(left_out)}.")
    table = Table(title="Runs", box=box.SIMPLE_HEAVY, title_justify="left", caption_justify="left")
    table.caption = " ".join(notes) or None
    table.add_column("run", overflow="fold")
    for name in figures:
        table.add_column(name, justify="left" if name in _TEXTS else "right", no_wrap=True)
    for number, label in enumerate(labels):
        table.add_row(label, *(cells[number] for cells in figures.values()))
    return table


def comparability(results: Sequence[Result]) -> str | None:
    """A warning for readers who compare perplexities; None if the runs have the same blocks."""
    if len({result["data"] for result in results}) == 1:
        return None
    return (
        "These runs were evaluated on different blocks (see the column data): their perplexities are not comparable; "
        "bits per byte are, where the eval text is the same."
    )

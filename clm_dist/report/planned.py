"""The plan of a run beside what came, as a table for a terminal and for a page."""

from typing import Any

from rich import box
from rich.table import Table as TerminalTable
from rich.text import Text

from clm_dist.against_plan import Comparison
from clm_dist.report.render import Table

_COLUMNS = ("", "planned", "came", "difference")


def plan_table(comparison: Comparison) -> TerminalTable:
    """The table for a terminal, with the notes below it."""
    table = TerminalTable(title="Plan", box=box.SIMPLE_HEAVY, title_justify="left", caption_justify="left")
    table.show_header = bool(comparison.rows)
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    for row in comparison.rows:
        table.add_row(row.name, row.planned, row.came, row.difference)
    table.caption = Text("\n".join(filter(None, [comparison.about, *comparison.notes])))
    return table


def plan_section(comparison: Comparison) -> dict[str, Any]:
    """The section of a page."""
    cells = [(row.name, row.planned, row.came, row.difference) for row in comparison.rows]
    return {
        "about": comparison.about,
        "table": Table(_COLUMNS, cells, frozenset(range(len(_COLUMNS)))),
        "notes": comparison.notes,
    }

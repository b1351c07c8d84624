"""Several runs as one HTML page: their figures, their curves over each other, and what differs in their jobs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clm_dist.config.describe import yaml_value
from clm_dist.config.load import read_saved_job
from clm_dist.config.schema import field_values
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import write_text
from clm_dist.files.records import read_records
from clm_dist.files.result import Result
from clm_dist.files.run_dir import RunDir
from clm_dist.report.charts import charts_of_runs
from clm_dist.report.compare import comparability, figures_of
from clm_dist.report.history import History
from clm_dist.report.render import Table, render_html


def write_comparison(
    path: Path, runs: Sequence[RunDir], labels: Sequence[str], results: Sequence[Result], said: Sequence[str]
) -> None:
    """Write the page, which is as private as the jobs in it.

    Args:
        said: what can be said of which run is better, see `better.verdicts`, and of the plans of runs.
    """
    histories = [(label, History.of(read_records(run.metrics))) for label, run in zip(labels, runs, strict=True)]
    charts = charts_of_runs(histories)
    each = max((curve.each for _, history in histories for curve in history.curves.values()), default=1)
    page = render_html(
        "comparison.html",
        f"{len(runs)} runs",
        {"charts": charts, "marks": []},
        summary=", ".join(labels),
        warning=comparability(results) or "",
        figures=Table(("", *labels), [(name, *cells) for name, cells in figures_of(results).items()]),
        verdicts=said,
        charts=charts,
        thinned=f"{each:,}" if each > 1 else "",
        differences=_differences(runs, labels),
    )
    write_text(path, page, private=True)


def _differences(runs: Sequence[RunDir], labels: Sequence[str]) -> Table:
    """The fields that are not equal in all jobs that this version reads."""
    jobs: list[dict[str, Any]] = []
    unread = []
    for label, run in zip(labels, runs, strict=True):
        jobs.append({})
        try:
            jobs[-1] = {name: value for name, value, _ in field_values(read_saved_job(run.job)) if name != "name"}
        except ConfigError:
            unread.append(label)
    fields = list(dict.fromkeys(name for job in jobs for name in job))
    cells = []
    for name in fields:
        values = [yaml_value(job[name]) if name in job else "-" for job in jobs]
        if len({value for job, value in zip(jobs, values, strict=True) if job}) > 1:
            cells.append((name, *values))
    note = f"The jobs of {', '.join(unread)} are of another version, which this one does not read." if unread else ""
    return Table(("field", *labels), cells, frozenset(range(len(labels) + 1)), note)

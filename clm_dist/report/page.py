"""A run as one HTML page that opens with no network: figures, plots, where the time went, data, samples, the job."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clm_dist.against_plan import Comparison, compare_with_plan
from clm_dist.config.describe import yaml_value
from clm_dist.config.load import read_saved_job
from clm_dist.config.schema import field_values
from clm_dist.errors import ConfigError, DataError
from clm_dist.files.atomic import write_text
from clm_dist.files.blocks import Manifest
from clm_dist.files.records import read_records
from clm_dist.files.result import Result, last_figures
from clm_dist.files.run_dir import RunDir
from clm_dist.files.samples import Samples, read_samples
from clm_dist.files.spent import PARTS, Spent
from clm_dist.report.charts import charts_of_run, marks_of
from clm_dist.report.data_tables import data_tables
from clm_dist.report.history import History, MarkKind
from clm_dist.report.planned import plan_section
from clm_dist.report.render import Table, render_html
from clm_dist.report.table import COLUMNS, change, describe_status, rows, show
from clm_dist.timing import clock

NBSP = "\u00a0"
_MOST_ROWS = 40
_SIGNS: dict[MarkKind, tuple[str, str, str]] = {
    "restart": ("¦", "c1", "workers started again"),
    "rollback": ("⋮", "c4", "rollback"),
    "skip": ("×", "bad", "step left out, or a value that is not finite"),
    "spike": ("▼", "warn", "loss stands out"),
    "problem": ("▼", "bad", "problem"),
    "kept": ("▼", "good", "the model that is kept"),
    "checkpoint": ("ı", "muted", "checkpoint"),
}
_PART_COLOURS = dict(zip(PARTS, (0, 5, 4, 1, 3, 6, 7, 2), strict=True))


def write_page(run: RunDir, result: Result, path: Path | None = None, *, history: History | None = None) -> None:
    """Write the page of a run, `report.html` by default, which is as private as the job in it.

    Args:
        history: that of the run's records, where they were read already.
    """
    job: list[tuple[str, Any, Any]] = []
    with contextlib.suppress(ConfigError):  # of another version: then it is shown as it is
        job = list(field_values(read_saved_job(run.job)))
    data = None
    with contextlib.suppress(FileNotFoundError, DataError):  # runs of earlier versions have none
        data = Manifest.read(run.data)
    history = history or History.of(read_records(run.metrics))
    page = render_page(
        result,
        history,
        run.job.read_text(encoding="utf-8"),
        fields=job,
        data=data,
        samples=read_samples(run),
        beside_plan=compare_with_plan(run, history),
    )
    write_text(path or run.report, page, private=True)


def render_page(
    result: Result,
    history: History,
    job: str,
    *,
    fields: Iterable[tuple[str, Any, Any]] = (),
    data: Manifest | None = None,
    samples: Samples | None = None,
    beside_plan: Comparison | None = None,
) -> str:
    """The page's HTML.

    Args:
        job: text of the job file.
        fields: name, value and default of the job's fields.
    """
    baseline = result["baseline"]["loss"] if result["baseline"] else None
    charts = charts_of_run(history, baseline, beside_plan.loss if beside_plan else None)
    kinds = {*history.marks} | ({"skip"} if any(s["missing"] for chart in charts for s in chart["series"]) else set())
    each = max((curve.each for curve in history.curves.values()), default=1)
    changed = [
        (name, yaml_value(value), "-" if default is ... else yaml_value(default))
        for name, value, default in fields
        if default is ... or value != default
    ]
    return render_html(
        "run.html",
        result["name"],
        {"charts": charts, "marks": marks_of(history)},
        status=result["status"],
        status_text=describe_status(result),
        summary=_summary(result, history),
        error=result.get("error", ""),
        cards=list(_cards(result, history)),
        charts=charts,
        signs=[
            {"sign": sign, "colour": colour, "text": text}
            for kind, (sign, colour, text) in _SIGNS.items()
            if kind in kinds
        ],
        thinned=f"{each:,}" if each > 1 else "",
        plan=beside_plan and plan_section(beside_plan),
        evaluations=_evaluations(result),
        spent=_spent(history.spent),
        events=_events(history),
        data=data and data_tables(data),
        samples=samples and _samples(samples),
        changed=Table(("field", "value", "default"), changed, frozenset((0, 1, 2))),
        job=job,
        facts=Table(("", ""), list(_facts(result, history)), frozenset((0, 1))),
    )


def _summary(result: Result, history: History) -> str:
    steps = f"{history.step:,} of {history.num_steps:,} steps" if history.num_steps else "no step was trained"
    ended = "as of" if result["status"] == "running" else "ended"
    workers = f"{result['workers']} worker{'s' if result['workers'] != 1 else ''}"
    return f"{steps}, epoch {history.epoch:.2f}, on {workers} ({result['strategy']}); {ended} {result['finished']}"


@dataclass(frozen=True)
class _Card:
    name: str
    value: str
    note: str = ""


def _cards(result: Result, history: History) -> Iterator[_Card]:
    baseline, last = result["baseline"], last_figures(result)
    if last:
        fell = change(baseline, last).replace(" ", NBSP)
        before = f"{show(baseline['perplexity'], ',.2f')} before, {fell}" if baseline else ""
        yield _Card("perplexity", show(last["perplexity"], ",.2f"), before)
        before = f"{show(baseline['bits_per_byte'], '.4f')} before" if baseline else ""
        yield _Card("bits per byte", show(last["bits_per_byte"], ".4f"), before)
    train = result["train"]
    yield _Card("tokens trained", _short(train["tokens"]), f"in {clock(train['seconds'])} of steps")
    if train["tokens_per_s"]:
        mfu = f"best MFU {history.best_mfu:.1%}" if history.best_mfu else ""
        yield _Card("tokens per second", _short(train["tokens_per_s"]), mfu)
    if history.peak_memory:
        yield _Card("memory", f"{history.peak_memory / 2**30:,.2f} GiB", "at most, on rank 0")
    if result["restarts"]:
        yield _Card("restarts", f"{result['restarts']}")


def _short(number: float) -> str:
    """A number in four characters or so: `542 k`."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if number >= size:
            scaled = number / (1e3 if unit == " k" else size)
            return f"{scaled:,.0f}{unit}" if scaled >= 100 else f"{scaled:.3g}{unit}"
    return f"{number:,.0f}"


def _evaluations(result: Result) -> Table:
    cells = rows(result)
    note = ""
    if len(cells) > _MOST_ROWS:
        best = min(range(len(cells)), key=lambda number: _loss(result, number))
        shown = {round(place * (len(cells) - 1) / (_MOST_ROWS - 1)) for place in range(_MOST_ROWS)} | {best}
        note = f"{len(shown)} of {len(cells):,} evaluations, the best among them; result.json has all."
        cells = [cells[number] for number in sorted(shown)]
    return Table(COLUMNS, cells, note=note)


def _loss(result: Result, row: int) -> float:
    """The loss in a row of `rows`, which begin with the baseline where there is one."""
    evals = [result["baseline"], *result["evals"]] if result["baseline"] else result["evals"]
    evaluation = evals[row]
    assert evaluation
    return evaluation["loss"]


def _spent(spent: Spent) -> dict[str, Any]:
    parts = spent.parts()
    total = sum(seconds for _, seconds in parts)
    return {
        "rows": [
            {
                "name": part,
                "about": PARTS[part],
                "seconds": f"{seconds:.3f}",
                "clock": clock(seconds) if seconds >= 10 else f"{seconds:.1f} s",
                "share": f"{seconds / total:.1%}",
                "colour": _PART_COLOURS[part],
            }
            for part, seconds in parts
        ],
        "note": "" if spent.is_whole else "Evaluations and starts of an earlier version have no times.",
    }


def _events(history: History) -> Table:
    """All marks but those of checkpoints that were saved."""
    kinds = [kind for kind in _SIGNS if kind != "checkpoint" and kind in history.marks]
    found = sorted((mark.step, kind, mark) for kind in kinds for mark in history.marks[kind].marks)
    cells = [
        (f"{step:,}", kind, mark.text + (f" (and {mark.also:,} more of this kind after it)" if mark.also else ""))
        for step, kind, mark in found
    ]
    return Table(("step", "kind", "what"), cells, frozenset((1, 2)))


def _samples(samples: Samples) -> dict[str, Any]:
    prompt = samples["prompt"]
    named = {"Before training": samples.get("before"), "After training": samples["after"]}
    return {
        "prompt": prompt,
        "seed": samples["seed"],
        "texts": [(name, (prompt, text.removeprefix(prompt))) for name, text in named.items() if text is not None],
    }


def _facts(result: Result, history: History) -> Iterator[tuple[str, str]]:
    hardware = result["hardware"]
    yield "device", hardware["device"] or "-"
    if history.hosts:
        yield "hosts", ", ".join(history.hosts)
    if hardware["cpus"]:
        yield "machine of the driver", f"{hardware['machine']}, {hardware['cpus']} CPUs"
    yield "compiled passes", "yes" if history.compiled else "no"
    yield "fingerprint of the blocks", result["data"]
    yield from result["versions"].items()

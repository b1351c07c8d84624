"""What the plots of a page show, as page.js draws it."""

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from clm_dist.files.plan_file import Interval
from clm_dist.report.history import History
from clm_dist.report.thin import Curve

_PANELS = (
    ("lr", "Learning rate", "", 1.0),
    ("grad_norm", "Gradient norm", "before clipping", 1.0),
    ("tokens_per_s", "Throughput", "tokens per second", 1.0),
    ("mfu", "Model FLOPs utilization", "% of the devices' peak", 100.0),
    ("memory_bytes", "Memory", "GiB on rank 0", 2.0**-30),
    ("router_loss", "Router loss", "of the mixture of experts", 1.0),
)
_NUM_COLOURS = 8


class Series(TypedDict):
    """A line of a plot; x and y are of equal length."""

    label: str
    colour: str
    """Name of a colour in page.css."""
    width: float
    points: bool
    """Whether points are marked."""
    x: list[float]
    y: list[float]
    missing: list[tuple[float, int]]
    """Where the curve has no finite value: the first step of such, and how many follow nearby."""


class Chart(TypedDict):
    """A plot over the steps."""

    id: str
    title: str
    unit: str
    wide: bool
    level: float | None
    """Height of a line across, the baseline."""
    expected: Interval | None
    """What is expected at the end of the run."""
    series: list[Series]


def charts_of_run(history: History, baseline: float | None, expected: Interval | None = None) -> list[Chart]:
    """The plots of a run, those without data left out.

    Args:
        expected: the eval loss to expect.
    """
    curves = history.curves
    losses = _band("training", curves["loss"], 1.0) if "loss" in curves else []
    if "eval" in curves:
        losses.append(_series("evaluation", curves["eval"].points(), "c1", width=2, marked=True))
    charts = []
    if losses:
        charts.append(_chart("loss", "Loss", "nats per token", losses, wide=True, level=baseline, expected=expected))
    for name, title, unit, factor in _PANELS:
        if name in curves:
            charts.append(_chart(name, title, unit, _band(title.lower(), curves[name], factor)))
    return charts


def charts_of_runs(histories: Sequence[tuple[str, History]]) -> list[Chart]:
    """Plots with a curve of each run, by its name; what no run has is left out."""
    charts = []
    losses = [
        (name, title, "nats per token", 1.0) for name, title in (("eval", "Eval loss"), ("loss", "Training loss"))
    ]
    for name, title, unit, factor in (*losses, *_PANELS):
        series = []
        for number, (label, history) in enumerate(histories):
            if name not in history.curves:
                continue
            curve = history.curves[name]
            # The extremes of several long runs over each other hide the runs.
            points = curve.means() if curve.each > 1 else curve.points()
            colour = f"c{number % _NUM_COLOURS}"
            series.append(_series(label, _scaled(points, factor), colour, marked=name == "eval", missing=curve))
        if series:
            charts.append(_chart(name, title, unit, series, wide=name in ("eval", "loss")))
    return charts


def marks_of(history: History) -> list[dict[str, Any]]:
    """What happened at which step; a mark may stand for more of its kind that followed."""
    return [
        {"kind": kind, "step": mark.step, "text": mark.text, "also": mark.also}
        for kind, marks in history.marks.items()
        for mark in marks.marks
    ]


def _band(label: str, curve: Curve, factor: float) -> list[Series]:
    """A curve; where it was thinned, its extremes with the means over them."""
    is_thinned = curve.each > 1
    points = _scaled(curve.points(), factor)
    series = [_series(label, points, "faint" if is_thinned else "c0", missing=curve)]
    return [*series, _series("mean", _scaled(curve.means(), factor), "c0")] if is_thinned else series


def _scaled(points: Iterable[tuple[float, float]], factor: float) -> list[tuple[float, float]]:
    return [(x, y * factor) for x, y in points]


def _chart(
    name: str,
    title: str,
    unit: str,
    series: list[Series],
    *,
    wide: bool = False,
    level: float | None = None,
    expected: Interval | None = None,
) -> Chart:
    return {
        "id": name,
        "title": title,
        "unit": unit,
        "wide": wide,
        "level": level,
        "expected": expected,
        "series": series,
    }


def _series(
    label: str,
    points: Sequence[tuple[float, float]],
    colour: str,
    *,
    width: float = 1.5,
    marked: bool = False,
    missing: Curve | None = None,
) -> Series:
    return {
        "label": label,
        "colour": colour,
        "width": width,
        "points": marked,
        # More digits than a screen has pixels cost bytes alone.
        "x": [round(x, 1) if x % 1 else int(x) for x, _ in points],
        "y": [float(f"{y:.6g}") for _, y in points],
        "missing": missing.without_value() if missing else [],
    }

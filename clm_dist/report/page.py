"""A run as one HTML page that opens with no network: figures, loss curves as SVG, the job."""

import html
import math
from collections.abc import Iterable, Sequence

from clm_dist.files.atomic import write_text
from clm_dist.files.record_types import Record
from clm_dist.files.records import read_records
from clm_dist.files.result import Result
from clm_dist.files.run_dir import RunDir
from clm_dist.report.table import COLUMNS, rows, show

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
h1 { margin-bottom: 0; } .sub { color: #5b6675; margin-top: .2rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .9rem; text-align: right; }
th { border-bottom: 2px solid #1c2430; font-weight: 600; } td { border-bottom: 1px solid #dfe4ea; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
svg { width: 100%; height: auto; } pre { background: #f4f6f8; padding: 1rem; overflow-x: auto; font-size: 13px; }
.legend span { display: inline-block; margin-right: 1.2rem; } .dot { width: .8rem; height: .8rem; border-radius: 50%; }
"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 800, 320, 64, 40, 14, 14
_TRAIN_COLOUR, _EVAL_COLOUR = "#8aa4c8", "#c2410c"
_MAX_POINTS = 600


class _Curve:
    """The points of a curve, in memory at most _MAX_POINTS. Where there were more, each is the mean of neighbours."""

    def __init__(self) -> None:
        self._sums: list[tuple[float, float, int]] = []
        self._each = 1
        """Points of which a mean is taken, a power of two; the last mean may be of fewer."""

    def add(self, x: float, y: float) -> None:
        if self._sums and self._sums[-1][2] < self._each:
            self._sums[-1] = _joined(self._sums[-1], (x, y, 1))
            return
        if len(self._sums) == _MAX_POINTS:
            self._sums = [_joined(*pair) for pair in zip(self._sums[::2], self._sums[1::2], strict=True)]
            self._each *= 2
        self._sums.append((x, y, 1))

    def points(self) -> list[tuple[float, float]]:
        return [(x / count, y / count) for x, y, count in self._sums]


def _joined(one: tuple[float, float, int], other: tuple[float, float, int]) -> tuple[float, float, int]:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def write_page(run: RunDir, result: Result) -> None:
    """Write `report.html`, which is as private as the job in it."""
    page = render_page(result, read_records(run.metrics), run.job.read_text(encoding="utf-8"))
    write_text(run.report, page, private=True)


def render_page(result: Result, records: Iterable[Record], job: str) -> str:
    """The page's HTML."""
    train, evals, speed = _Curve(), _Curve(), _Curve()
    for record in records:
        if record["kind"] == "step":
            train.add(record["step"], record["loss"])
            speed.add(record["step"], record["tokens_per_s"])
        elif record["kind"] == "eval":
            evals.add(record["step"], record["loss"])
    name = html.escape(result["name"])
    figures = result["train"]
    body = [
        f"<h1>{name}</h1>",
        f'<p class="sub">{html.escape(_summary(result))}</p>',
        _eval_table(result),
        "<h2>Loss</h2>",
        f'<p class="legend"><span style="color:{_TRAIN_COLOUR}">&#9679; training, a step</span>'
        f'<span style="color:{_EVAL_COLOUR}">&#9679; evaluation</span></p>',
        _plot([(train, _TRAIN_COLOUR, False), (evals, _EVAL_COLOUR, True)], "step", "nats per token"),
        "<h2>Speed</h2>",
        f"<p>{figures['tokens']:,} tokens in {figures['seconds']:,.0f} s of training steps.</p>",
        _plot([(speed, _TRAIN_COLOUR, False)], "step", "tokens/s"),
        "<h2>Run</h2>",
        _facts(result),
        "<h2>Job</h2>",
        f"<pre>{html.escape(job)}</pre>",
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _summary(result: Result) -> str:
    train = result["train"]
    speed = show(train["tokens_per_s"], ",.0f")
    summary = f"{result['status']} after {train['steps']} steps on {result['workers']} workers ({result['strategy']})"
    error = f". {result['error']}" if "error" in result else ""
    return f"{summary}, {speed} tokens/s, finished {result['finished']}{error}"


def _eval_table(result: Result) -> str:
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>" for cells in rows(result))
    return f"<table><tr>{head}</tr>{body}</table>"


def _facts(result: Result) -> str:
    facts = {
        "blocks": result["data"],
        "restarts": result["restarts"],
        "device": result["hardware"]["device"],
        "machine": f"{result['hardware']['machine']}, {result['hardware']['cpus']} CPUs",
    } | result["versions"]
    lines = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table>{lines}</table>"


def _plot(series: Sequence[tuple[_Curve, str, bool]], x_name: str, y_name: str) -> str:
    """An SVG line plot; each series is its curve, its colour and whether points are marked."""
    shown = [(points, colour, marked) for curve, colour, marked in series if (points := curve.points())]
    if not shown:
        return "<p>No data yet.</p>"
    xs = [x for points, _, _ in shown for x, _ in points]
    ys = [y for points, _, _ in shown for _, y in points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    margin = 0.05 * (max(ys) - min(ys)) or 1.0
    y_low, y_high = min(ys) - margin, max(ys) + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    parts = []
    for y in _ticks(y_low, y_high):
        left, down = place(x_low, y)
        parts.append(f'<line x1="{left}" x2="{_WIDTH - _RIGHT}" y1="{down}" y2="{down}" stroke="#e3e8ee"/>')
        parts.append(f'<text x="{left - 8}" y="{down + 4}" text-anchor="end">{y:,g}</text>')
    for x in _ticks(x_low, x_high):
        parts.append(f'<text x="{place(x, y_low)[0]}" y="{_HEIGHT - 20}" text-anchor="middle">{x:,g}</text>')
    for points, colour, marked in shown:
        path = " ".join("{},{}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if marked:
            parts += ['<circle cx="{}" cy="{}" r="4" fill="{}"/>'.format(*place(x, y), colour) for x, y in points]
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{x_name}</text>')
    middle = _HEIGHT / 2
    parts.append(f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{y_name}</text>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="12" fill="#5b6675" role="img" '
        f'aria-label="{y_name} by {x_name}">{"".join(parts)}</svg>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers in a range."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]

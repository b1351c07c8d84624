"""The picture of a run's loss in its model card: a PNG, because the Hub shows no SVG."""

import logging
from collections.abc import Iterable
from pathlib import Path

from clm_dist.errors import StorageError, first_line
from clm_dist.files.atomic import whole_file
from clm_dist.files.record_types import Record
from clm_dist.report.thin import Curve

logger = logging.getLogger(__name__)

_TRAIN, _EVAL, _TEXT, _GRID = "#8aa4c8", "#c2410c", "#1c2430", "#e3e8ee"
_INCHES, _DPI = (8, 4), 150


def draw_loss(records: Iterable[Record], target: Path) -> bool:
    """Write the picture of the training and the eval loss by step.

    Returns:
        false, and there is no file, where there are fewer than two points, or it cannot be drawn, which is logged.
    """
    train, evals = Curve(), list[tuple[int, float]]()
    for record in records:
        if record["kind"] == "step":
            train.add(record["step"], record["loss"])
        elif record["kind"] == "eval":
            evals.append((record["step"], record["loss"]))
    points = train.means()
    if len(points) + len(evals) < 2:
        target.unlink(missing_ok=True)
        return False
    try:
        with whole_file(target) as unfinished:
            _draw(points, evals, unfinished)
    except StorageError:
        raise
    except Exception as error:  # of fonts, or of settings of a person's own: the card does without
        logger.warning("the card has no picture: %s", first_line(error))
        target.unlink(missing_ok=True)
        return False
    return True


def _draw(train: list[tuple[float, float]], evals: list[tuple[int, float]], target: Path) -> None:
    # It says on the screen that it makes a cache of fonts, or where it can't.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context():
        # Not those of a person's own plots.
        matplotlib.rcdefaults()
        figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
        axes = figure.add_subplot()
        if train:
            axes.plot(*zip(*train, strict=True), color=_TRAIN, linewidth=1.5, label="training")
        if evals:
            axes.plot(*zip(*evals, strict=True), color=_EVAL, linewidth=2, marker="o", markersize=4, label="evaluation")
        axes.set_xlabel("step", color=_TEXT)
        axes.set_ylabel("loss, nats per token", color=_TEXT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(target, format="png")

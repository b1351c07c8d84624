"""eval_losses.npy: the evaluation of a run's model by micro-batch, in the order of the eval split.

That is the last one, or with `train.keep: best` the best.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clm_dist.files.atomic import damaged, whole_file
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import MicroLoss

EvalLosses = npt.NDArray[np.float64]
"""(num_micros, 2): summed loss in nats, and predicted tokens."""


def write_eval_losses(run: RunDir, micros: Sequence[MicroLoss]) -> None:
    """Write them, in whatever order they come. Raises StorageError where the disk is full."""
    rows = [(micro.loss_sum, micro.num_tokens) for micro in sorted(micros, key=lambda micro: micro.index)]
    with whole_file(run.eval_losses) as unfinished, unfinished.open("wb") as file:
        np.save(file, np.array(rows, dtype=np.float64).reshape(-1, 2))


def read_eval_losses(run: RunDir) -> EvalLosses | None:
    """The losses; None where an earlier version evaluated the run. Raises ConfigError where the file is damaged."""
    if not run.eval_losses.is_file():
        return None
    try:
        losses: EvalLosses = np.load(run.eval_losses, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise damaged(run.eval_losses, "it is not an array of numbers") from error
    if losses.ndim != 2 or losses.shape[1] != 2 or losses.dtype != np.float64:
        raise damaged(run.eval_losses, f"it has {losses.dtype} of shape {losses.shape}")
    return losses

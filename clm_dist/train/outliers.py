"""Steps whose loss or gradient is not finite, or whose loss stands out: judged, and written down with their blocks.

`Outliers` decides and changes nothing of the run; the loop does what its verdict says.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from clm_dist.config.job import TrainConfig
from clm_dist.files.atomic import make_dir, write_json
from clm_dist.files.blocks import Blocks
from clm_dist.metrics import SPIKE_WINDOW, spike_limit

MOST_LEFT_OUT = 10
"""Fail after this many skipped steps in a row."""
SHOWN_BLOCKS = 16
"""Blocks that records and messages name; the file of the step names all."""

BlockLosses = Sequence[tuple[npt.NDArray[np.int64], Tensor]]
"""For each pass, the numbers of its blocks and the mean loss of each, (B,) and (B,)."""
_Pairs = list[tuple[int, float]]


@dataclass(frozen=True)
class Verdict:
    """The kind of a step, and the action that the job asks for."""

    kind: Literal["nonfinite", "spike"] | None
    """None for an ordinary step."""
    action: Literal["train", "report", "skip", "stop", "rollback"]
    """`train` and `report` keep the update; after any other none was made."""
    limit: float
    """The loss above which the step stands out."""

    @property
    def is_trained(self) -> bool:
        return self.action in ("train", "report")


class Outliers:
    """Judges each step by the losses of those before it."""

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self.recent_losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.num_left_out = 0
        """Steps in a row whose loss or gradient was not finite."""

    def limit(self) -> float:
        """The loss above which the next step stands out."""
        return spike_limit(self.recent_losses)

    def drops(self, loss: float, limit: float) -> bool:
        """Whether the loss alone says that no update is made."""
        return not math.isfinite(loss) or (loss > limit and self._train.on_spike == "skip")

    def judge(self, loss: float, grad_norm: float, limit: float) -> Verdict:
        """The verdict on a step, and its loss remembered. `drops` was heeded."""
        finite = math.isfinite(loss)
        if finite:
            self.recent_losses.append(loss)
        # In fp16 the loss scaler deals with a gradient that overflows.
        if not finite or not (math.isfinite(grad_norm) or self._train.precision == "fp16"):
            self.num_left_out += 1
            return Verdict("nonfinite", self._train.on_nan, limit)
        verdict = Verdict("spike", self._train.on_spike, limit) if loss > limit else Verdict(None, "train", limit)
        if verdict.is_trained and self._train.on_nan == "skip":
            self.num_left_out = 0
        return verdict

    def restore(self, recent_losses: Iterable[float], num_left_out: int) -> None:
        """Go on from what a checkpoint remembers."""
        self.recent_losses.clear()
        self.recent_losses.extend(recent_losses)
        self.num_left_out = max(self.num_left_out, num_left_out)


def gather_losses(own: BlockLosses, gather: Callable[[_Pairs], list[_Pairs]]) -> dict[int, float]:
    """The mean loss of each block of a step, over all ranks. Collective.

    Args:
        gather: gives what every rank has.
    """
    pairs = [(int(b), float(v)) for blocks, values in own for b, v in zip(blocks, values, strict=True)]
    return dict(pair for rank in gather(pairs) for pair in rank)


def worst_first(batch: npt.NDArray[np.int64], losses: Mapping[int, float]) -> list[int]:
    """The blocks of a step that stands out: those whose own loss is not finite, else all, the highest loss first."""
    broken = [int(block) for block in batch if not math.isfinite(losses[int(block)])]
    return broken or sorted(losses, key=lambda block: -losses[block])


def write_outlier(
    file: Path,
    figures: Mapping[str, Any],
    ordered: Sequence[int],
    losses: Mapping[int, float],
    *,
    blocks: Blocks,
    tokenizer: Any,
) -> None:
    """Write what a step was, and its blocks with their text.

    Args:
        ordered: the blocks to write, the worst first.

    Raises:
        ConfigError, StorageError: the file cannot be written.
    """
    texts = tokenizer.batch_decode([blocks[np.array([block])][0] for block in ordered])
    rows = [
        {"block": block, "loss": json_number(losses[block]), "text": text}
        for block, text in zip(ordered, texts, strict=True)
    ]
    make_dir(file.parent)
    write_json(file, {**figures, "blocks": rows})


def json_number(value: float) -> float | str:
    """A number as JSON can hold it: a string where it is not finite."""
    return value if math.isfinite(value) else str(value)


def describe_nonfinite(step: int, loss: float) -> str:
    """The value that is not finite in a step, in words."""
    if math.isfinite(loss):
        return f"the gradient of step {step} is not finite (loss {loss:.4f})"
    return f"the loss of step {step} is {loss}"


def advise(ordered: Sequence[int], file: Path) -> str:
    """Advice for a step that is not finite."""
    shown = ", ".join(map(str, ordered[:SHOWN_BLOCKS])) + (", ..." if len(ordered) > SHOWN_BLOCKS else "")
    return (
        f"It was computed on blocks {shown}, whose text is in {file}. Lower train.learning_rate, add "
        "train.warmup_steps or look at the data"
    )

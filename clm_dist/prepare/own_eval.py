"""Records of their own for the eval split: `data.eval_path` and `data.eval_split`.

They are read as `data.path` and `data.split` are, by the same functions. Their errors name the fields that the job has.
"""

import re
from typing import Any

from clm_dist.config.data import DataConfig
from clm_dist.errors import ClmDistError


def eval_data(data: DataConfig) -> DataConfig | None:
    """The data that the eval split is read from; None where it is a share of the records."""
    if not data.has_own_eval:
        return None
    return data.model_copy(
        update={"path": data.eval_path or data.path, "split": "train" if data.eval_split is None else data.eval_split}
    )


def named_as_eval(text: str, data: DataConfig) -> str:
    """A text about the data of the eval split, with the names of its own fields."""
    names = {"split": "eval_split"} | ({"path": "eval_path"} if data.eval_path is not None else {})
    # Not inside of a file's name.
    return re.sub(
        r"(?<![\w./-])data\.(path|split)(?![\w/-]|\.\w)", lambda found: f"data.{names.get(found[1], found[1])}", text
    )


class naming:  # noqa: N801  # a context manager reads as a verb
    """Turns errors about the data of the eval split into errors that name its own fields.

    Args:
        of_eval: whether the data is that of the eval split; errors of other data stay as they are.
    """

    def __init__(self, data: DataConfig, *, of_eval: bool) -> None:
        self.data = data
        self.of_eval = of_eval

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.of_eval and isinstance(error, ClmDistError):
            field = named_as_eval(error.field, self.data) if error.field else None
            raise type(error)(named_as_eval(str(error), self.data), field=field) from error

"""On which side of the hash split fixed records lie."""

import pyarrow as pa

from clm_dist.config.data import DataConfig
from clm_dist.prepare.documents import held_out

_KEYS: dict[str, dict[str, str | float | None]] = {
    "id": {"id": "id"},
    "text": {"id": None, "text": "text"},
    "list of texts": {"id": None, "text": "texts"},
    "template": {"id": None, "text": "{text}: {texts}"},
    "eval_fraction 0.5": {"id": "id", "eval_fraction": 0.5},
}
_RECORDS = {
    "id": [f"q{number}" for number in range(200)],
    "text": [f"question {number}" for number in range(200)],
    "texts": [[f"answer {number}.{i}" for i in range(number % 4)] for number in range(200)],
}


def pinned_sides() -> dict[str, str]:
    """For each key of the split, a letter a record: `e` for eval, `t` for train."""
    table = pa.table(_RECORDS)
    sides = {}
    for name, settings in _KEYS.items():
        data = DataConfig.model_validate({"source": "builtin", "split_method": "hash", **settings})
        sides[name] = "".join("e" if side else "t" for side in held_out(table, data))
    return sides

"""The lines of metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from clm_dist.errors import ConfigError


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that a crash cut short is left out.

    Raises:
        ConfigError: another line is no record; the message names it.
    """
    if not path.exists():
        return []
    # Every whole record ends with a newline, so what follows the last one is a fragment or nothing.
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not record.keys() >= {"kind", "step"}:
            raise ConfigError(f"{path}:{number}: not a record of a run; remove this line")
        records.append(record)
    return records

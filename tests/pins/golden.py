"""Golden values beside the tests that compare with them."""

import json
from typing import Any

from tests.conftest import ROOT

DIRECTORY = ROOT / "tests" / "pins"


def read_golden(name: str) -> Any:
    return json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))


def write_golden(name: str, value: Any) -> None:
    (DIRECTORY / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

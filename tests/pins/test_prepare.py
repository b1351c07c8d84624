"""The blocks of a fixed corpus stay what they were; `python -m tests.pins shards sides` writes the golden values."""

from pathlib import Path
from typing import Any

import pytest

from tests.pins.golden import read_golden
from tests.pins.shards import CASES, ENGINES, pinned_store
from tests.pins.sides import pinned_sides


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pins")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_shards_are_those_of_the_golden_file(case: str, engine: str, directory: Path) -> None:
    expected: dict[str, Any] = read_golden("shards")[case]
    assert pinned_store(directory, case, engine) == expected


def test_every_case_decides_the_blocks() -> None:
    golden = read_golden("shards")
    assert list(golden) == list(CASES)
    hashes = [tuple(case["sha256"].values()) for name, case in golden.items() if name != "document_mask"]
    assert len(set(hashes)) == len(hashes)
    assert golden["document_mask"] == golden["carry, random"]


def test_records_stay_on_their_side_of_the_hash_split() -> None:
    assert pinned_sides() == read_golden("sides")

"""The short forms of the drills that kill a run or change its number of workers; their modules are the long ones.

Other numbers of workers without Ray, for every strategy, are in tests/train/test_strategy.py.
"""

import pytest

from tests.drills import kills, other_workers


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "storage", "num_kills"),
    [
        ("ddp", "directory", 4),
        ("zero3", "s3", 4),
    ],
)
def test_kills_change_no_bit(strategy: str, storage: str, num_kills: int, capsys: pytest.CaptureFixture[str]) -> None:
    if storage == "s3":
        pytest.importorskip("moto.server", reason="moto[server] is not installed")
    code = kills.main(["--strategies", strategy, "--kills", str(num_kills), "--storage", storage])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.count(f"| {strategy} | ") == num_kills


@pytest.mark.long
def test_other_numbers_of_workers_change_no_loss(capsys: pytest.CaptureFixture[str]) -> None:
    code = other_workers.main(["--strategies", "zero2"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "| zero2 | 2 from 0, 1 from " in printed

"""Signals to the driver while a run trains."""

import os
import signal
from pathlib import Path

import pytest

from clm_dist.files.run_dir import RunDir
from clm_dist.train.ray import driver
from tests.support.notes import Notes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_driver_asks_the_workers_to_stop(number: signal.Signals, tmp_path: Path) -> None:
    run, notes = RunDir(tmp_path), Notes()
    before = signal.getsignal(number)
    with driver._stop_on_signals(run, notes):
        os.kill(os.getpid(), number)
        assert run.stop.exists()
        assert f"{number.name}: saving a checkpoint, then stopping." in notes.notes[0]
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_signal_is_heeded_though_nobody_reads_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, notes = RunDir(tmp_path), Notes()

    def note(text: str) -> None:
        # A terminal that is stopped lets nobody go on from here.
        assert run.stop.exists()

    monkeypatch.setattr(notes, "note", note)
    with driver._stop_on_signals(run, notes):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_under_nohup_goes_on_when_its_terminal_closes(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with driver._stop_on_signals(RunDir(tmp_path), Notes()):
            os.kill(os.getpid(), signal.SIGHUP)
        assert not RunDir(tmp_path).stop.exists()
    finally:
        signal.signal(signal.SIGHUP, before)

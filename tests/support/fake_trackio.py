"""A package `trackio` for the processes that a test starts: it writes its calls down, and fails where it is told to."""

import os
from pathlib import Path

import pytest

_MODULE = """\
import json, os, signal, time
def _keep(*call):
    with open({calls!r}, "a") as file:
        file.write(json.dumps(call) + "\\n")
def init(**asked):
    _keep("init", asked["name"], os.getpid())
    {init}
    return Run()
class Run:
    def log(self, values, step):
        _keep("log", step, values)
        {log}
    def finish(self):
        _keep("finish")
        {finish}
"""


def write_fake_trackio(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, init: str = "pass", log: str = "pass", finish: str = "pass"
) -> Path:
    """Put the package before others, and return the file of its calls, a JSON list a line.

    Args:
        init, log, finish: a statement that the function of this name ends with.
    """
    directory.mkdir()
    calls = directory / "calls.jsonl"
    (directory / "trackio.py").write_text(_MODULE.format(calls=str(calls), init=init, log=log, finish=finish))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH")))))
    return calls

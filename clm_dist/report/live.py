"""The page of a run that is not finished."""

import time
from collections.abc import Callable
from pathlib import Path

from clm_dist.config.load import read_saved_job
from clm_dist.errors import ConfigError, first_line
from clm_dist.files.blocks import Manifest
from clm_dist.files.records import read_records
from clm_dist.files.result import Result, build_result, read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.report.page import write_page

_INTERVAL_S = 30.0
_SHARE = 20
"""Of the time between two pages, one part in so many may be spent on writing them."""


def read_progress(path: Path) -> Result:
    """The result of a run, or the figures until now of one that is not finished.

    Raises:
        ConfigError: there is no run, none of its workers has begun to train, or a file of it is damaged.
    """
    run = RunDir(path)
    if run.result.is_file() or not run.exists():
        return read_result(path)
    if not run.data.is_file() or not any(r["kind"] == "start" for r in read_records(run.metrics, last_steps=0)):
        raise ConfigError(
            f"{path} has no result yet, and no worker of it has begun to train; see what its log says, or start it "
            f"with `clm-dist run {run.job}`"
        )
    result = build_result(read_saved_job(run.job), run, Manifest.read(run.data), "running")
    # Those of this process and its machine say nothing of where the run is trained.
    result["versions"] = {}
    result["hardware"] |= {"machine": "", "cpus": None}
    result["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(run.metrics.stat().st_mtime))
    return result


class LivePage:
    """Writes the page of a run while it is trained: at most every half minute, and in a twentieth of the time.

    Args:
        note: tells a person what hinders it; it ends no run, and is told once.
    """

    def __init__(self, run: RunDir, note: Callable[[str], None]) -> None:
        self._run, self._note = run, note
        self._due = 0.0
        self._has_begun = self._is_told = False

    def look(self) -> None:
        """Write the page if it is due; called when there are new records."""
        self._has_begun = True
        began = time.monotonic()
        if began < self._due:
            return
        self._write()
        ended = time.monotonic()
        self._due = ended + max(_INTERVAL_S, _SHARE * (ended - began))

    def finish(self) -> None:
        """Write the page of a run that has ended, if it has trained."""
        if self._has_begun:
            self._write()

    def _write(self) -> None:
        try:
            write_page(self._run, read_progress(self._run.root))
        except Exception as error:  # a page is no reason to end a run
            if not self._is_told:
                self._is_told = True
                self._note(
                    f"{self._run.report} cannot be written ({first_line(error)}); the run goes on, and "
                    f"`clm-dist report {self._run.root}` writes it later"
                )

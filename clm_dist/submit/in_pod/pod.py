"""Constants and settings that the programs in pods share with the renderer of the pods."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clm_dist.submit.ray_settings import RAY_SETTINGS as _RAY_SETTINGS

JOB_DIR = "/etc/clm-dist"
"""Directory of the job file in pods."""
CODE = "code.zip"
"""File in that directory: the code of a working tree, if it replaces the image's."""
PLAN = "plan.json"
"""File in that directory: the plan of the run, if it was planned."""
PORT = 6379
"""Port of Ray's head; every pod has an address of its own."""
DASHBOARD_PORT = 8265
RESERVE_S = 20
"""Seconds of the grace period that are kept for what comes after saving."""
RAY_SETTINGS = {
    **_RAY_SETTINGS,
    # The preStop hook has already made the run save.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}


@dataclass(frozen=True)
class Pod:
    """This pod, from its environment variables."""

    name: str
    address: str
    """Its IP address."""
    state: Path
    """The submission's files, on the claim."""
    grace_s: float
    """Seconds between the announcement that the pod ends and its end."""
    submission: str
    """Number that distinguishes submissions of the same name."""

    @classmethod
    def this(cls) -> "Pod":
        env = os.environ
        state, grace_s = Path(env["CLM_DIST_STATE"]), float(env["CLM_DIST_GRACE_S"])
        return cls(env["POD_NAME"], env["POD_IP"], state, grace_s, env["CLM_DIST_SUBMISSION"])

    @property
    def log(self) -> Path:
        """The driver's log, over all attempts of this submission."""
        return self.state / f"log-{self.submission}"

    def say(self, text: str) -> None:
        """Add a line to the submission's log of this pod, and to the pod's own log."""
        print(f"{now()} {text}", flush=True)
        with contextlib.suppress(OSError):  # a full or absent disk ends nothing
            self.nodes.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self.nodes / f"{self.name}.log").open("a", encoding="utf-8") as log:
                log.write(f"{now()} {text}\n")

    @property
    def nodes(self) -> Path:
        return self.state / "nodes"


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def exit_code(returncode: int) -> int:
    """The exit code of a process as a shell reports it: 137 after SIGKILL."""
    return returncode if returncode >= 0 else 128 - returncode


def processes() -> Iterator[tuple[int, list[str]]]:
    """The processes of this container, and the words of their command lines."""
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
            yield int(directory.name), words

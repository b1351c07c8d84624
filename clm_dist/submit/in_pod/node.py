"""Ray in a pod of an Indexed Job: `python -m clm_dist.submit.in_pod.node [OPTIONS of ray start] -- DRIVER...`.

The first pod runs Ray's head and the driver, and ends with the driver's exit code. The others join the head, and join
again after it was replaced; they run until the Job's successPolicy ends them.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from clm_dist.submit.in_pod.pod import PORT, Pod, exit_code
from clm_dist.submit.ray_settings import answers, end_descendants

_POLL_S = 1.0
_ENDED_BY_SIGNAL = 128 + signal.SIGTERM


class PodNode:
    """Ray in this pod.

    Args:
        head: host name of the first pod.
        options: options of `ray start` for the resources of the pod.
        driver: the command of the driver.
    """

    def __init__(self, pod: Pod, head: str, options: Sequence[str], driver: Sequence[str]) -> None:
        self._pod, self._head, self._options, self._driver = pod, head, options, driver
        self._told = False

    def run(self, *, is_head: bool) -> int:
        signal.signal(signal.SIGTERM, self._end)
        try:
            return self._run_head() if is_head else self._run_worker()
        finally:
            end_descendants()

    def _run_head(self) -> int:
        ray = self._start_ray("--head", f"--port={PORT}", "--include-dashboard=false")
        environment = {**os.environ, "RAY_ADDRESS": f"{self._pod.address}:{PORT}"}
        driver = subprocess.Popen(self._driver, env=environment)
        while driver.poll() is None and ray.poll() is None:
            time.sleep(_POLL_S)
        if driver.poll() is None:
            if not self._told:
                self._pod.say(f"Ray's head has ended with {ray.returncode}")
                driver.kill()
            driver.wait()
        # The Job replaces a pod that was told to end; only success ends the Job.
        return exit_code(driver.returncode)

    def _run_worker(self) -> int:
        while not self._told:
            if not answers(self._head, PORT):
                time.sleep(_POLL_S)
                continue
            ray = self._start_ray(f"--address={self._head}:{PORT}")
            while ray.poll() is None and not self._told:
                time.sleep(_POLL_S)
            if not self._told:
                self._pod.say(f"Ray has ended with {ray.returncode}; waiting for its head")
                end_descendants()
                time.sleep(_POLL_S)
        # With 0 the pod would count as done, and the Job would not replace it.
        return _ENDED_BY_SIGNAL

    def _start_ray(self, *place: str) -> "subprocess.Popen[bytes]":
        self._pod.say(f"starting Ray: {' '.join([*place, *self._options])}")
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        return subprocess.Popen([*start, *place, f"--node-ip-address={self._pod.address}", *self._options])

    def _end(self, _number: int, _frame: Any) -> None:
        self._told = True


def main() -> int:
    words = sys.argv[1:]
    split = words.index("--")
    node = PodNode(Pod.this(), os.environ["CLM_DIST_HEAD"], words[:split], words[split + 1 :])
    return node.run(is_head=os.environ["JOB_COMPLETION_INDEX"] == "0")


if __name__ == "__main__":
    sys.exit(main())

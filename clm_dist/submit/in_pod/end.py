"""The preStop hook of a pod: `python -m clm_dist.submit.in_pod.end`.

It makes the run save: it signals the driver if that is in this pod, and otherwise tells Ray to drain this node. Then
it keeps Ray's logs, and ends Ray.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from clm_dist.submit.in_pod.pod import PORT, RESERVE_S, Pod, processes

_POLL_S = 0.5
_RAY = (sys.executable, "-m", "ray.scripts.scripts")


def main() -> int:
    pod = Pod.this()
    deadline = time.monotonic() + pod.grace_s - RESERVE_S
    if pid := _process("clm_dist.submit.in_pod.driver"):
        pod.say("the pod is to end: telling the driver")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        _wait(lambda: not _process("clm_dist"), deadline)
    elif _is_training() and (node := _ray_node()):
        pod.say("the pod is to end: draining its node of Ray")
        _drain(node, deadline - time.monotonic())
    _wait(lambda: not _is_training(), deadline)
    pod.say("the run has saved" if not _is_training() else "the run has not saved in time")
    try:
        shutil.copytree("/tmp/ray/session_latest/logs", pod.nodes / pod.name, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:  # a full disk must not delay the end
        pod.say(f"not all of Ray's logs are kept: {error}"[:500])
    subprocess.run([*_RAY, "stop", "--grace-period=5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return 0


def _wait(is_over: Callable[[], bool], deadline: float) -> None:
    while not is_over() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _process(module: str) -> int | None:
    """The process of a module, if it runs in this pod."""
    return next((pid for pid, words in processes() if words[1:3] == ["-m", module]), None)


def _ray_node() -> str | None:
    """The id of this pod's Ray node, from the command line of its raylet."""
    for _, words in processes():
        if words[0].endswith("/raylet"):
            return next((word.partition("=")[2] for word in words if word.startswith("--node_id=")), None)
    return None


def _is_training() -> bool:
    return any("TrainWorker" in words[0] for _, words in processes())


def _drain(node: str, seconds: float) -> None:
    head = os.environ.get("FQ_RAY_IP") or os.environ["CLM_DIST_HEAD"]
    command = [*_RAY, "drain-node", f"--address={head}:{PORT}", f"--node-id={node}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the pod is to end"]
    command += [f"--deadline-remaining-seconds={max(1, int(seconds))}"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30)


if __name__ == "__main__":
    sys.exit(main())

"""What the hosts of Ray share: addresses, and the end of all that a process started."""

import subprocess
import sys
from pathlib import Path

from clm_dist.submit.ray_settings import address_towards, interface_of
from tests.support.processes import running


def test_the_address_towards_a_host_is_on_the_network_that_leads_there() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None


_END_DESCENDANTS = """
import ctypes, subprocess, sys, time
from pathlib import Path
from clm_dist.submit.ray_settings import end_descendants
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
# Its parent has ended, it has a session of its own, and ignores what can be ignored.
daemon = Path(sys.argv[1])
subprocess.run(["setsid", "sh", "-c", '(trap "" TERM HUP INT; exec sleep 300) & echo $! >"$0"', daemon])
child = subprocess.Popen(["sh", "-c", "sleep 300 & sleep 300"])
end_descendants()
print(daemon.read_text().strip(), child.pid)
"""


def test_what_has_left_its_parent_is_ended_and_nobody_else_is(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "300"]) as bystander:
        try:
            command = [sys.executable, "-c", _END_DESCENDANTS, str(tmp_path / "daemon")]
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=20)
            daemon, child = map(int, ended.stdout.split())
            assert running([daemon, child, bystander.pid]) == [bystander.pid]
        finally:
            bystander.kill()

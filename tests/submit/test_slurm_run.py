"""A whole script on a host that there is not: what it passes on, how it ends, and when it requeues itself."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clm_dist.submit.slurm.render import render_run
from tests.support.fakes import full_job, request_of, submission

_WAIT_S = 20
_PROGRAMS = {
    # Ray works until the attempt ends, or until it is told to fail; the driver does what a test wrote.
    "python3": """
case "$2" in
    clm_dist.submit.slurm.ray_node)
        while now=$(<"$3"/attempt); [ "${now:-$4}" = "$4" ] && [ ! -f "$HERE/ray-fails" ]; do /usr/bin/sleep 0.02; done
        [ ! -f "$HERE/ray-fails" ] || exit 1 ;;
    clm_dist)
        env >"$HERE/environment"
        stat -c %a "$RAY_AUTH_TOKEN_PATH" "$TMPDIR" >"$HERE/modes"
        echo "$*" >"$HERE/part" && mv "$HERE/part" "$HERE/driver-started"
        . "$HERE/driver" ;;
esac
""",
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": """
case $1 in
    requeue)
        refuse=$(cat "$HERE/refuse" 2>/dev/null || echo 0)
        echo $((refuse - 1)) >"$HERE/refuse"
        [ "$refuse" -le 0 ] && echo "$2" >>"$HERE/requeued" ;;
    show) case $2 in
        job) echo "$3" >"$HERE/shown"; cat "$HERE/job-state" ;;
        node) echo "   NodeAddr=$(sed -n "s/^$3 //p" "$HERE/node-addresses" 2>/dev/null) NodeHostName=$3" ;;
        hostnames) printf "n1\\n"; [ "$SLURM_JOB_NUM_NODES" -lt 2 ] || printf "n2\\n" ;;
    esac ;;
esac
""",
    # What names stand for, and the routes. An address stands for itself.
    "getent": """
[[ $1 = ahostsv4 && $2 = *:* ]] && exit 2
if [[ $2 =~ ^[0-9.]+$|: ]]; then echo "$2 STREAM"; else sed -n "s/^$2 //p" "$HERE/names"; fi
""",
    "ip": 'echo "$3 dev eth0 src $(sed -n "s/^$3 //p" "$HERE/routes") uid 0"',
    # Seconds are short here, and what waits for Slurm to end it is ended.
    "sleep": '[ "$1" = 300 ] || exec /usr/bin/sleep 0.05',
}
_WORKS = "while true; do /usr/bin/sleep 0.02; done"


@dataclass
class Host:
    """Where scripts run, with programs that stand for Slurm's, Ray and the driver."""

    here: Path
    job_id: str
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return submission(self.here / "it's the runs").root

    def start(
        self, driver: str, *settings: str, restarts: int = 0, sweep: bool = False, num_nodes: int = 2
    ) -> "subprocess.Popen[bytes]":
        """Start a job whose driver is some lines of bash, or the second run of a sweep."""
        (self.here / "driver").write_text(driver)
        given = submission(self.here / "it's the runs", run_names=("a", "b") if sweep else (), sweep=sweep)
        given.files(1).root.mkdir(parents=True, exist_ok=True)
        one = request_of(given, venv=self.here / "the venv")
        script = self.here / "script"
        script.write_text(render_run(full_job(*settings), one))
        environment = {
            "PATH": os.environ["PATH"],
            "HERE": str(self.here),
            "SLURM_CONF": "/dev/null",  # a Slurm that is on this machine is not asked
            "SLURM_JOB_ID": self.job_id,
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_JOB_NUM_NODES": str(num_nodes),
            "SLURMD_NODENAME": "n1",
            "SLURM_CPUS_PER_TASK": "32",
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
            **({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"} if sweep else {}),
        }
        with (self.here / "said").open("wb") as said:
            self.processes.append(subprocess.Popen(["bash", str(script)], env=environment, stdout=said, stderr=said))
        return self.processes[-1]

    def set_network(self, *, names: Sequence[str], routes: Sequence[str], nodes: Sequence[str] = ()) -> None:
        """What names of hosts resolve to, the own address on the way to each address, and Slurm's of each host."""
        for file, lines in (("names", names), ("routes", routes), ("node-addresses", nodes)):
            (self.here / file).write_text("".join(f"{line}\n" for line in lines))

    def run(self, driver: str, *settings: str, **given: Any) -> tuple[int, str]:
        """The exit code of a job, and what it said."""
        return self.end(self.start(driver, *settings, **given))

    def end(self, process: "subprocess.Popen[bytes]") -> tuple[int, str]:
        return process.wait(_WAIT_S), (self.here / "said").read_text()

    def wait_for_driver(self) -> None:
        self.wait_until(lambda: (self.here / "driver-started").exists())

    def wait_for_words(self, words: str) -> None:
        self.wait_until(lambda: words in (self.here / "said").read_text())

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + _WAIT_S
        while not condition():
            assert time.monotonic() < end, (self.here / "said").read_text()
            time.sleep(0.02)

    @property
    def requeued(self) -> bool:
        return (self.here / "requeued").exists()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    programs = tmp_path / "the venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in _PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    made = Host(tmp_path, str(10_000_000 + os.getpid()))
    made.state.mkdir(parents=True)
    # The name of the second host stands for 127.0.1.1 as well.
    made.set_network(names=["n2 127.0.1.1", "n2 10.1.2.4"], routes=["10.1.2.4 10.1.2.3", "127.0.0.1 127.0.0.1"])
    yield made
    for process in made.processes:
        process.kill()
        process.wait()
    assert not list(Path("/tmp").glob(f"clm-dist-job-{made.job_id}*"))


@pytest.mark.parametrize(
    ("driver", "restarts", "code", "requeued"),
    [
        ("exit 0", 0, 0, False),
        ("exit 2", 0, 2, False),
        ("exit 1", 0, 1, False),
        ("exit 127", 0, 127, False),
        ("exit 75", 0, 75, True),
        ("exit 75", 19, 75, True),
        ("exit 75", 20, 75, False),
        ("touch $HERE/ray-fails; exit 1", 0, 1, True),
        ("touch $HERE/ray-fails; exit 2", 0, 2, False),
        ("touch $HERE/ray-fails; exit 0", 0, 0, False),
        (f"touch $HERE/ray-fails; {_WORKS}", 0, 137, True),
        (f"touch $HERE/ray-fails; {_WORKS}", 20, 137, False),
    ],
)
def test_a_job_is_requeued_where_running_again_helps(
    host: Host, driver: str, restarts: int, code: int, requeued: bool
) -> None:
    assert host.run(driver, restarts=restarts)[0] == code
    assert host.requeued == requeued
    assert (host.state / "attempt").read_text() == f"{host.job_id}.{restarts} ended\n"
    assert not (host.state / "token").exists()


def test_a_job_that_was_requeued_too_often_starts_nothing(host: Host) -> None:
    code, said = host.run("exit 0", "cluster.slurm.max_requeues=2", restarts=3)
    assert (code, host.requeued) == (1, False)
    assert f"job {host.job_id}, attempt 3: this is requeue 3, and cluster.slurm.max_requeues is 2: submit" in said
    assert not (host.here / "driver-started").exists()


@pytest.mark.parametrize(("number", "code", "requeued"), [(signal.SIGUSR1, 75, True), (signal.SIGTERM, 143, False)])
def test_a_signal_reaches_the_driver_which_saves(host: Host, number: signal.Signals, code: int, requeued: bool) -> None:
    name = number.name.removeprefix("SIG")
    process = host.start(f"trap 'touch \"$HERE/saved\"; exit 75' {name}; {_WORKS}")
    host.wait_for_driver()
    process.send_signal(number)
    ended, said = host.end(process)
    assert (ended, host.requeued, (host.here / "saved").exists()) == (code, requeued, True)
    assert f"signal {name}\n" in said
    assert "the driver ended with 75\n" in said


def test_an_attempt_that_a_later_one_has_replaced_touches_nothing(host: Host) -> None:
    code, said = host.run(f"echo {host.job_id}.1 >{shlex.quote(str(host.state))}/attempt; exit 75")
    assert (code, host.requeued) == (1, False)
    assert "a later attempt has begun" in said
    assert (host.state / "attempt").read_text() == f"{host.job_id}.1\n"
    assert (host.state / "token").exists()


def test_the_driver_is_told_where_its_ray_is_and_has_a_token_that_nobody_reads(host: Host) -> None:
    host.run("exit 0", "cluster.workers=[4,16]", restarts=4)
    assert (host.here / "driver-started").read_text() == f"-m clm_dist run {host.state}/job.yaml\n"
    assert (host.here / "modes").read_text() == "600\n700\n"
    environment = dict(
        line.split("=", 1) for line in (host.here / "environment").read_text().splitlines() if "=" in line
    )
    address, _, port = environment["RAY_ADDRESS"].rpartition(":")
    assert int(port) == 20_000 + 2 * ((int(host.job_id) + 4 * 1009) % 5_000)
    assert address == "10.1.2.3"
    assert address in environment["NO_PROXY"]
    assert environment["CLM_DIST_NODES"] == "2"
    assert environment["CLM_DIST_RUNS"] == str(host.here / "it's the runs")
    assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN_PATH"]) == ("token", f"{host.state}/token")
    assert environment["SRUN_CPUS_PER_TASK"] == "32"


def test_each_attempt_has_a_port_of_its_own(host: Host) -> None:
    ports = set()
    for restarts in range(3):
        host.run("exit 75", restarts=restarts)
        text = (host.here / "environment").read_text()
        ports.add(next(line for line in text.splitlines() if line.startswith("RAY_ADDRESS=")))
    assert len(ports) == 3


def test_without_clm_dist_in_the_environment_nothing_is_started(host: Host) -> None:
    (host.here / "the venv" / "bin" / "python3").write_text('#!/bin/sh\n[ "$1" != -c ]\n')
    assert host.run("exit 0")[0] == 2
    assert not (host.state / "attempt").exists()


def test_a_signal_before_the_driver_is_there_is_passed_on_to_it(host: Host) -> None:
    process = host.start(f"trap 'exit 75' USR1; {_WORKS}", "cluster.slurm.setup='touch \"$HERE/begun\"; sleep 0.5'")
    host.wait_until(lambda: (host.here / "begun").exists())
    process.send_signal(signal.SIGUSR1)
    _, said = host.end(process)
    assert "signal USR1\n" in said
    assert host.requeued


@pytest.mark.parametrize(("state", "requeued"), [("TIMEOUT", True), ("CANCELLED", False)])
def test_a_save_that_is_late_for_the_time_limit_is_requeued_but_no_job_that_is_cancelled(
    host: Host, state: str, requeued: bool
) -> None:
    (host.here / "job-state").write_text(f"JobState={state} Reason=None")
    process = host.start(f"trap : USR1; trap 'exit 75' TERM; {_WORKS}")
    host.wait_for_driver()
    for number, name in ((signal.SIGUSR1, "USR1"), (signal.SIGTERM, "TERM")):
        process.send_signal(number)
        host.wait_for_words(f"signal {name}")
    host.end(process)
    assert host.requeued == requeued


def test_a_run_of_a_sweep_is_requeued_and_not_the_array(host: Host) -> None:
    host.run("exit 75", sweep=True)
    assert (host.here / "requeued").read_text() == "7_1\n"


def test_a_controller_that_is_away_for_a_moment_is_asked_again(host: Host) -> None:
    (host.here / "refuse").write_text("2")
    _, said = host.run("exit 75")
    assert host.requeued
    (host.here / "requeued").unlink()
    (host.here / "refuse").write_text("99")
    code, said = host.run("exit 75")
    assert (code, host.requeued) == (75, False)
    assert "submit the job again to go on" in said


def test_storage_that_is_away_at_the_end_is_no_later_attempt(host: Host) -> None:
    state = shlex.quote(str(host.state))
    code, _ = host.run(f"rm {state}/attempt; exit 75")
    assert (code, host.requeued) == (75, True)


@pytest.mark.parametrize("settings", [(), ("cluster.slurm.interface=ib9",)])
def test_without_an_address_nothing_is_started(host: Host, settings: tuple[str, ...]) -> None:
    (host.here / "the venv" / "bin" / "ip").write_text("#!/bin/sh\nexit 1\n")
    code, said = host.run("exit 0", *settings)
    assert code == 2
    assert "no address of this host: is cluster.slurm.interface right" in said
    assert not (host.here / "driver-started").exists()


_LOOP = ["127.0.0.1 127.0.0.1"]


@pytest.mark.parametrize(
    ("num_nodes", "names", "nodes", "routes", "address"),
    [
        # Slurm's address is taken where no name resolves, or a name leads to the host itself.
        (2, [], ["n2 10.9.0.2"], ["10.9.0.2 10.9.0.1"], "10.9.0.1"),
        (2, ["n1 127.0.1.1", "n2 127.0.1.1"], ["n2 10.9.0.2"], ["10.9.0.2 10.9.0.1"], "10.9.0.1"),
        (2, ["n2 10.1.2.4"], ["n2 10.9.0.2"], ["10.9.0.2 10.9.0.1", "10.1.2.4 10.1.2.3"], "10.1.2.3"),
        (2, ["other 10.9.0.2"], ["n2 other"], ["10.9.0.2 10.9.0.1"], "10.9.0.1"),
        # Of the other host nothing is known, of this one something is.
        (2, [], ["n1 10.9.0.1"], ["10.9.0.1 10.9.0.1"], "10.9.0.1"),
        (2, [], ["n2 fd00::2"], ["fd00::2 fd00::1"], "[fd00::1]"),
        (2, ["n2 fe80::2", "n2 fd00::2"], ["n2 n2"], ["fd00::2 fd00::1"], "[fd00::1]"),
        (1, [], [], _LOOP, "127.0.0.1"),
        (1, ["n1 127.0.1.1"], ["n1 n1"], _LOOP, "127.0.0.1"),
        (1, ["n1 10.9.0.1"], ["n1 n1"], ["10.9.0.1 10.9.0.1"], "10.9.0.1"),
    ],
)
def test_ray_has_an_address_that_the_other_hosts_reach(
    host: Host, num_nodes: int, names: list[str], nodes: list[str], routes: list[str], address: str
) -> None:
    host.set_network(names=names, nodes=nodes, routes=routes)
    code, said = host.run("exit 0", num_nodes=num_nodes)
    assert code == 0, said
    environment = dict(
        line.split("=", 1) for line in (host.here / "environment").read_text().splitlines() if "=" in line
    )
    assert environment["RAY_ADDRESS"].rpartition(":")[0] == address
    assert environment["no_proxy"] == address.strip("[]")


@pytest.mark.parametrize(
    ("names", "nodes", "routes"),
    [
        ([], [], _LOOP),
        (["n1 127.0.1.1", "n2 127.0.1.1"], ["n1 n1", "n2 n2"], _LOOP),
        ([], ["n2 10.9.0.2"], ["10.9.0.2 127.0.0.1"]),
        ([], ["n2 fd00::2"], ["fd00::2 ::1"]),
    ],
)
def test_two_hosts_never_meet_at_an_address_of_one(
    host: Host, names: list[str], nodes: list[str], routes: list[str]
) -> None:
    host.set_network(names=names, nodes=nodes, routes=routes)
    code, said = host.run("exit 0")
    assert (code, host.requeued, (host.here / "driver-started").exists()) == (2, False, False)
    assert f"no address but {routes[0].split()[1]} of this host, which the other hosts cannot reach" in said
    assert "set cluster.slurm.interface to the network between them" in said


def test_a_driver_that_does_not_take_the_signal_yet_is_ended_by_it_and_the_job_requeued(host: Host) -> None:
    process = host.start(_WORKS)
    host.wait_for_driver()
    process.send_signal(signal.SIGUSR1)
    assert host.end(process)[0] == 128 + signal.SIGUSR1
    assert host.requeued


def test_a_file_that_is_being_written_does_not_end_the_attempt(host: Host) -> None:
    state = shlex.quote(str(host.state))
    code, said = host.run(f": >{state}/attempt; /usr/bin/sleep 1; echo {host.job_id}.0 >{state}/attempt; exit 0")
    assert (code, "Ray has ended" in said) == (0, False)


def test_a_run_of_a_sweep_asks_whether_it_was_cancelled_itself(host: Host) -> None:
    (host.here / "job-state").write_text("JobState=CANCELLED Reason=None")
    process = host.start(f"trap : USR1; trap 'exit 75' TERM; {_WORKS}", sweep=True)
    host.wait_for_driver()
    for number, name in ((signal.SIGUSR1, "USR1"), (signal.SIGTERM, "TERM")):
        process.send_signal(number)
        host.wait_for_words(f"signal {name}")
    assert host.end(process)[0] == 143
    assert (host.here / "shown").read_text() == "7_1\n"

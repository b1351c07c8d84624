"""`clm-dist logs` of a job on Kubernetes: one text from all pods, every line once."""

from types import SimpleNamespace

import pytest

from clm_dist.errors import SubmitError
from clm_dist.submit import logs
from clm_dist.submit.k8s.kubectl import Kubectl
from clm_dist.submit.k8s.logs import PodLogs
from clm_dist.submit.submission import Place
from tests.support.clusters import RAY_JOB, Kubernetes, KubernetesCommands
from tests.support.fakes import submission


def line(second: int, text: str, *, own: int | None = None) -> str:
    """A line as the server has it; own: the second that the program itself wrote, unless that is the server's."""
    stamp = f"2026-01-01 10:00:{second if own is None else own:02}"
    return f"2026-01-01T10:00:{second:02}.000000000Z {stamp} {text}"


@pytest.mark.slow
def test_lines_of_all_pods_are_in_the_order_of_their_own_times(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    k8s_commands.submit()
    kubernetes.add_pod("tiny-d", "driver")
    kubernetes.add_pod("tiny-w1")
    kubernetes.add_pod("tiny-w2")  # which has not started
    kubernetes.add_pod("other-w1", run="other")
    kubernetes.log("other-w1", line(1, "of another run"))
    kubernetes.log("tiny-d", line(8, "begins", own=1), line(8, "goes on", own=5))
    kubernetes.log("tiny-w1", line(3, "up"), "2026-01-01T10:00:04.000000000Z [red]no time[/red]", line(7, "down"))
    merged = [
        "[driver] 2026-01-01 10:00:01 begins",
        "[tiny-w1] 2026-01-01 10:00:03 up",
        "[tiny-w1] [red]no time[/red]",
        "[driver] 2026-01-01 10:00:05 goes on",
        "[tiny-w1] 2026-01-01 10:00:07 down",
    ]
    assert k8s_commands.call("logs").out.splitlines() == merged
    assert k8s_commands.call("logs", "-n", 2).out.splitlines() == merged[-2:]


@pytest.mark.slow
def test_a_submission_without_pods_has_no_logs(kubernetes: Kubernetes, k8s_commands: KubernetesCommands) -> None:
    k8s_commands.submit()
    said = k8s_commands.call("logs")
    assert (said.code, said.out) == (0, "")


@pytest.mark.slow
def test_following_sees_pods_that_come_later_and_ends_with_the_job(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    k8s_commands.submit()
    kubernetes.set(RAY_JOB, jobDeploymentStatus="Running", jobStatus="RUNNING")
    kubernetes.add_pod("tiny-w1")
    kubernetes.log("tiny-w1", line(1, "first"))
    sleeps: list[float] = []

    def work(seconds: float) -> None:
        """What the job does while nobody looks: a pod comes, the other goes, and all ends."""
        sleeps.append(seconds)
        if len(sleeps) == 1:
            kubernetes.add_pod("tiny-d", "driver")
            kubernetes.log("tiny-d", line(2, "second"), line(2, "second"))
        elif len(sleeps) == 2:
            kubernetes.store.delete("v1", "pods", "default", "tiny-w1")
            kubernetes.log("tiny-d", line(2, "second"), line(3, "last"))
            kubernetes.set(RAY_JOB, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
        assert len(sleeps) < 4, "the job has ended, and logs -f has not"

    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=work, monotonic=lambda: 9.0 * len(sleeps)))
    said = k8s_commands.call("logs", "-f")
    second = "[driver] 2026-01-01 10:00:02 second"
    assert said.out.splitlines() == [
        *("[tiny-w1] 2026-01-01 10:00:01 first", second, second, second),
        "[driver] 2026-01-01 10:00:03 last",
    ]
    assert sleeps == [1.0, 1.0, 0]


def answer(monkeypatch: pytest.MonkeyPatch, *answers: str | SubmitError) -> list[str | None]:
    """Let kubectl's logs be these, one call after another; gives what time each call was asked from."""
    left, asked = list(answers), []

    def said(kubectl: Kubectl, labels: dict[str, str], since: str | None = None) -> str:
        asked.append(since)
        found = left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(Kubectl, "logs", said)
    monkeypatch.setattr(Kubectl, "find", lambda *_: [])
    return asked


def test_only_what_may_be_new_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = "[pod/a/ray] " + line(1, "one"), "[pod/b/ray] " + line(2, "two")
    waits = 'error: container "ray" in pod "c" is waiting to start: ContainerCreating'
    away = "error: Get https://n3:10250/containerLogs: connection refused"
    asked = answer(monkeypatch, f"{one}\n{away}\n", f"{one}\n{two}\n{waits}\n", f"{two}\n", f"{one}\n")
    merged = PodLogs(submission(k8s=Place("default")))
    assert [len(merged.new_lines()) for _ in range(4)] == [1, 1, 0, 0]
    # What a node that was away has is not passed over.
    assert asked == [None, None, "2026-01-01T09:59:02+00:00", "2026-01-01T09:59:02+00:00"]


def test_following_outlives_an_api_server_that_is_away_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[pod/a/ray] " + line(1, "one")
    answer(monkeypatch, SubmitError("kubectl: connection refused"), text, text)
    ticks = iter(range(0, 100, 10))
    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: next(ticks)))
    actives = iter([True, True, False])
    merged = PodLogs(submission(k8s=Place("default")))
    assert list(logs.follow(merged.new_lines, lambda: next(actives))) == ["[a] 2026-01-01 10:00:01 one"]


def test_lines_without_the_servers_time_are_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = "[pod/a/ray] unable to retrieve container logs for containerd://1a2b"
    other = f"{lost}\n[pod/a/ray] no time either\n[pod/b/ray] {line(1, 'one')}\n[pod/b/ray] 2026-01-01T10:00:02Z\n"
    answer(monkeypatch, lost, other, other)
    merged = PodLogs(submission(k8s=Place("default")))
    assert merged.new_lines() == ["[a] unable to retrieve container logs for containerd://1a2b"]
    assert merged.new_lines() == ["[a] no time either", "[b] 2026-01-01 10:00:01 one", "[b] "]
    assert merged.new_lines() == []

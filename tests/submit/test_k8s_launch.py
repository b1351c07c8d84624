"""`clm-dist submit k8s`, `status`, `logs` and `cancel` against an API server: a job from its submission to its end."""

import base64

import pytest

from clm_dist.submit.training import Training
from tests.support.clusters import JOB, RAY_JOB, Kubernetes, KubernetesCommands
from tests.support.command import cells

pytestmark = pytest.mark.slow


def test_a_ray_job_is_submitted_seen_logged_and_cancelled(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    said = k8s_commands.submit("--pods", 2, "--set", "train.seed=7")
    assert said.code == 0, said.err
    assert said.out.splitlines() == [
        "submitted tiny as rayjob/tiny in the namespace default",
        "clm-dist status tiny · clm-dist logs -f tiny · clm-dist cancel tiny",
    ]
    assert kubernetes.names() == {"configmaps/tiny", "networkpolicies/tiny", "rayjobs/tiny"}
    assert "seed: 7" in kubernetes.get(("v1", "configmaps"))["data"]["job.yaml"]
    said = k8s_commands.call("status")
    assert cells(said.out, "tiny")[:5] == ["tiny", "rayjob/tiny", "pending", "", "0"], said.err
    assert "tiny: the KubeRay operator has not started it yet; is the operator running?" in said.out
    kubernetes.add_pod("tiny-head", "head", node="n1")
    kubernetes.add_pod("tiny-w2", node="n3")
    kubernetes.add_pod("tiny-d1", "driver", node="n1")
    training = Training(step=50, num_steps=1200, loss=3.21, seconds_left=80.0, planned="planned 2 min; and so on")
    kubernetes.log(
        "tiny-d1",
        "2026-01-01T10:00:09.000000000Z 2026-01-01 10:00:09 Step 50, epoch 0.12: eval loss 2.1",
        f"2026-01-01T10:00:10.000000000Z 2026-01-01 10:00:10 {training.as_line()}",
    )
    kubernetes.log("tiny-w2", "2026-01-01T10:00:01.000000000Z 2026-01-01 10:00:01 up")
    kubernetes.set(RAY_JOB, jobDeploymentStatus="Running", jobStatus="RUNNING", failed=1, jobId="tiny-x")
    said = k8s_commands.call("status", "tiny")
    assert cells(said.out, "tiny") == [
        *("tiny", "rayjob/tiny", "running", "n1,n3", "1", "50/1200", "3.2100", "1:20", "")
    ]
    assert said.out.endswith("\ntiny: planned 2 min; and so on\n")
    assert k8s_commands.call("logs").out.splitlines() == [
        "[tiny-w2] 2026-01-01 10:00:01 up",
        "[driver] 2026-01-01 10:00:09 Step 50, epoch 0.12: eval loss 2.1",
    ]
    kubernetes.set(RAY_JOB, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    said = k8s_commands.call("status")
    assert (cells(said.out, "tiny")[2], "why:" in said.out) == ("done", False)
    said = k8s_commands.call("cancel")
    assert said.out == (
        "deleted rayjob/tiny in the namespace default; what the run has saved stays on the claim, and submitting the "
        "same job again goes on from it\n"
    )
    assert kubernetes.names() == {"pods/tiny-head", "pods/tiny-w2", "pods/tiny-d1"}
    assert cells(k8s_commands.call("status").out, "tiny")[2] == "deleted"
    assert k8s_commands.call("cancel").out.startswith("there is no rayjob/tiny in the namespace default; ")


def test_a_plain_job_has_a_random_key_that_is_shown_nowhere(
    kubernetes: Kubernetes, k8s_commands: KubernetesCommands
) -> None:
    said = k8s_commands.submit("--plain", "--pods", 2)
    assert said.code == 0, said.err
    assert kubernetes.names() == {
        *("secrets/tiny-ray", "configmaps/tiny", "networkpolicies/tiny", "services/tiny", "jobs/tiny")
    }
    secret = kubernetes.get(("v1", "secrets"), "tiny-ray")
    key = base64.b64decode(secret["data"]["auth_token"]).decode()
    assert len(key) == 64
    assert secret["metadata"]["labels"]["app.kubernetes.io/part-of"] == "clm-dist"
    written = "".join(path.read_text() for path in k8s_commands.runs.rglob("*") if path.is_file())
    assert key not in said.out + said.err + written
    index = {"batch.kubernetes.io/job-completion-index": "0"}
    kubernetes.add_pod("tiny-0-x", labels=index, node="n1")
    kubernetes.set(JOB, active=2, failed=3)
    assert cells(k8s_commands.call("status").out, "tiny")[:5] == ["tiny", "job/tiny", "running", "n1", "3"]
    assert k8s_commands.call("cancel").code == 0
    assert kubernetes.names() == {"pods/tiny-0-x"}

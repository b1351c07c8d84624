"""Records of a run that nobody trained: with a restart, outliers, a rollback and gradients that are not finite."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028 & \"quotes\" 'too' <!-- {{ 7 * 7 }}"


def history(num_steps: int, *, seed: int = 0, events: bool = True, num_evals: int = 10) -> Iterator[dict[str, Any]]:
    """The records of a run of so many steps; with events it is restarted half-way, and has one spike of loss 99."""
    random = Random(seed)
    now = 1_700_000_000.0
    start = {"kind": "start", "num_steps": num_steps, "pid": 1, "workers": 4, "strategy": "ddp"}
    start |= {"device": "NVIDIA H200", "owes_evaluation": False, "compiled": True, "hosts": ["node-a", "node-b"]}

    def evaluation(step: int) -> Iterator[dict[str, Any]]:
        nonlocal now
        yield {"kind": "phase", "step": step, "phase": "Evaluating", "time": now}
        now += 2
        loss = 3 + 5 * math.exp(-5 * step / num_steps)
        figures = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 3, "num_tokens": 4096}
        yield {"kind": "eval", "step": step, "epoch": 3 * step / num_steps, "seconds": 2.0} | figures

    yield start | {"step": 0, "time": now, "startup": 20.0}
    yield from evaluation(0)
    for step in range(1, num_steps + 1):
        at = {"step": step, "epoch": 3 * step / num_steps}
        if events and step == num_steps // 2:
            reason = f"killed {HOSTILE}"
            yield {"kind": "failure", "step": step - 1, "worker": 1, "error": reason, "time": now}
            yield start | {"step": step - 1, "time": now + 60, "startup": 60.0, "lost": 12.5}
            now += 60
        if events and step == num_steps // 4:
            yield {
                "kind": "nonfinite",
                "step": step,
                "loss": "nan",
                "grad_norm": "inf",
                "blocks": [3],
                "action": "skip",
            }
            continue
        if events and step == num_steps // 3:
            outlier = {"loss": 99.0, "grad_norm": 40.0, "blocks": [1, 2], "action": "report", "limit": 9.0}
            yield {"kind": "spike", "step": step} | outlier
        if events and step == num_steps * 3 // 4:
            yield {"kind": "rollback", "step": step, "to": step - 1}
        loss = 3 + 5 * math.exp(-5 * step / num_steps) + random.gauss(0, 0.15)
        seconds = random.uniform(0.09, 0.11)
        now += seconds
        yield {
            "kind": "step",
            **at,
            "loss": 99.0 if events and step == num_steps // 3 else loss,
            "lr": 3e-4 * min(1.0, 20 * step / num_steps) * (1 - step / (num_steps + 1)),
            "grad_norm": None if events and step % max(1, num_steps // 5) == 7 else abs(random.gauss(1, 0.2)),
            "tokens": 8192,
            "seconds": seconds,
            "tokens_per_s": 8192 / seconds,
            "mfu": 0.04 / seconds / 10,
            "data_wait": 0.002,
            "blocks": step,
            **({"memory_bytes": 60 * 2**30 + step} if step % 10 == 0 else {}),
        }
        if step % max(1, num_steps // 20) == 0:
            saved = {"bytes": 5 * 10**8, "seconds": 3.0, "blocked": 0.02}
            yield {"kind": "checkpoint", "step": step, "name": f"step-{step:08d}-00000000", **saved}
        if step % max(1, num_steps // num_evals) == 0:
            yield from evaluation(step)


def write_history(path: Path, num_steps: int, **options: Any) -> None:
    """Write these records as a metrics file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in history(num_steps, **options))

"""Losses and blocks of a small run under each strategy, with two workers."""

import hashlib
from pathlib import Path
from typing import Any

from clm_dist.config.job import JobConfig
from clm_dist.progress import Silent
from tests.pins.corpus import fixed_job
from tests.support.runs import metrics_of
from tests.support.stores import prepare
from tests.support.training import STRATEGIES, train_several
from tests.support.workers import run_workers
from tests.train.test_strategy import train_and_resume

STEPS = 20
_NUM_RECORDS = 170
SETTINGS = (
    f"train.max_steps={STEPS}",
    "train.epochs=9",
    "train.warmup_steps=3",
    "cluster.workers=2",
    # No save and no evaluation between the first step and the last.
    "checkpoint.every=1000",
    "eval.every=1000",
)
WITH_DROPOUT = (
    "model.config.resid_pdrop=0.2",
    "model.config.embd_pdrop=0.1",
    "model.config.attn_pdrop=0.2",
    "checkpoint.every=4",
    "checkpoint.keep=9",
    "eval.every=epoch",
)


def small_job(directory: Path, *settings: str) -> JobConfig:
    """The fixed job with a step of four passes, of which each of two workers makes two."""
    return fixed_job(directory, *SETTINGS, *settings, num_records=_NUM_RECORDS)


def small_store(directory: Path) -> Path:
    """The blocks of every small run; an epoch has fewer steps than the run, and its last batch is short."""
    return prepare(small_job(directory), directory / "stores", Silent())


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in metrics_of(run / "metrics.jsonl") if record["kind"] == "step"]


def train_strategies(directory: Path, *strategies: str) -> dict[str, Path]:
    """The run directory of each strategy; all are trained by the same two processes."""
    jobs = [small_job(directory, f"cluster.strategy={strategy}") for strategy in strategies]
    runs = [directory / strategy for strategy in strategies]
    outcomes = run_workers(train_several, 2, jobs, runs, small_store(directory))[0]
    assert [outcome.status for outcome in outcomes] == ["done"] * len(strategies)
    return dict(zip(strategies, runs, strict=True))


def pinned_losses(directory: Path) -> dict[str, list[Any]]:
    """Loss, learning rate, tokens and block checksum of each step under DDP; other strategies have the same."""
    steps = steps_of(train_strategies(directory, "ddp")["ddp"])
    return {name: [record[name] for record in steps] for name in ("loss", "lr", "tokens", "blocks")}


def exact_numbers(directory: Path) -> str:
    """Every number of runs with dropout that must stay equal to the last bit on one machine, a line a record.

    Each strategy trains to the end, and once more from the checkpoint of step 4.
    """
    lines = []
    store = small_store(directory)
    for strategy in STRATEGIES:
        job = small_job(directory, *WITH_DROPOUT, f"cluster.strategy={strategy}")
        whole, cut = directory / f"{strategy}-whole", directory / f"{strategy}-cut"
        run_workers(train_and_resume, 2, job, whole, cut, store)
        for name, run in (("whole", whole), ("resumed", cut)):
            for record in metrics_of(run / "metrics.jsonl"):
                if record["kind"] in ("step", "eval", "verify"):
                    norm = record.get("grad_norm")
                    numbers = [record["loss"].hex(), *([norm.hex()] if norm is not None else [])]
                    words = (strategy, name, record["kind"], record["step"], *numbers, record.get("blocks", ""))
                    lines.append(" ".join(map(str, words)).rstrip())
            weights = run / "final.unverified" / "model.safetensors"
            lines.append(f"{strategy} {name} weights {hashlib.sha256(weights.read_bytes()).hexdigest()}")
    return "\n".join(lines) + "\n"

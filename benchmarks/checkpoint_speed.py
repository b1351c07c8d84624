"""How long does a checkpoint hold up training, and how long would it if training waited for it?

    python benchmarks/checkpoint_speed.py [--strategies ddp zero2 zero3 fsdp2] [--report OUT.md]

Two workers train a GPT-2 of DistilGPT2's shape (82 M parameters; weights and AdamW's moments take 0.98 GB) for a few
steps and save every fourth. Once a save goes on in the background as it always does; once, for the comparison, training
waits inside the save until the file is on disk with its checksum. `blocked` is the time that the training thread spends
in a save, before the next update and at the next save; bound: 5 % of what the synchronous save takes.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from processes import environment, markdown, run_processes

from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.progress import Silent
from clm_dist.train.checkpointing.saver import Saver
from clm_dist.train.evaluate import EvalSplit
from clm_dist.train.local import train_here
from clm_dist.train.recorder import Recorder
from tests.support.stores import prepare

BOUND = 0.05
STEPS, EVERY = 12, 4


@dataclass(frozen=True)
class Figures:
    num_bytes: int
    blocked: float
    """Seconds of training, the mean of the saves."""
    seconds: float
    """From the begin of a save to its file on disk."""
    step_seconds: float
    """The median of the steps in which nothing was saved."""


def train_rank(rank: int, world_size: int, job: JobConfig, root: Path, store: Path, wait: bool) -> None:
    """Train as one rank; with `wait` every save is synchronous. Collective."""
    if wait:
        begin = Saver.begin

        def begin_and_wait(self: Saver, *arguments: Any) -> None:
            began = time.perf_counter()
            begin(self, *arguments)
            assert self._thread
            self._thread.join()
            self._blocked = time.perf_counter() - began

        Saver.begin = begin_and_wait  # type: ignore[method-assign, assignment]
    run = RunDir(root)
    run.root.mkdir(parents=True, exist_ok=True)
    split = EvalSplit.of_store(store, job.eval.micro_size)
    recorder = Recorder(
        run, Checkpoints.of_run(job, run), num_micros=split.num_micros, num_tokens=split.num_tokens, keep=2
    )
    outcome = train_here(job, run, store, recorder, rank=rank, world_size=world_size)
    assert outcome.status == "done", outcome.error


def figures_of(run: RunDir) -> Figures:
    records = list(read_records(run.metrics))
    # The last save has no step after it that could be held up.
    saves = [r for r in records if r["kind"] == "checkpoint"][:-1]
    quiet = [r["seconds"] for r in records if r["kind"] == "step" and r["step"] % EVERY == 0]
    return Figures(
        saves[0]["bytes"],
        statistics.mean(r["blocked"] for r in saves),
        statistics.mean(r["seconds"] for r in saves),
        statistics.median(quiet),
    )


def build_job(directory: Path, strategy: str) -> JobConfig:
    shape = {"model_type": "gpt2", "n_layer": 6, "n_embd": 768, "n_head": 12, "n_positions": 128}
    job = {
        "name": strategy,
        "data": {"source": "builtin", "id": "topic", "block_size": 64, "eval_fraction": 0.02},
        "tokenizer": {"train": {"vocab_size": 4096}},
        # The vocabulary of GPT-2, so that the model has its size.
        "model": {"config": shape | {"vocab_size": 50257}},
        "batch": {"global_size": 2, "micro_size": 1},
        "train": {"max_steps": STEPS},
        "eval": {"every": 10**6},
        "checkpoint": {"every": EVERY},
        "cluster": {"workers": 2, "strategy": strategy},
    }
    path = directory / f"{strategy}.yaml"
    path.write_text(yaml.safe_dump(job))
    return load_job(path).config


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--report", type=Path, help="write the figures as Markdown")
    options = parser.parse_args(arguments)
    rows, passed = [], True
    with tempfile.TemporaryDirectory() as temporary:
        for strategy in options.strategies:
            job = build_job(Path(temporary), strategy)
            store = prepare(job, Path(temporary) / "stores", Silent())
            found = {}
            for wait in (True, False):
                root = Path(temporary) / f"{strategy}-{wait}"
                run_processes(train_rank, 2, job, root, store, wait)
                found[wait] = figures_of(RunDir(root))
            waiting, background = found[True], found[False]
            share = background.blocked / waiting.blocked
            passed &= share < BOUND
            rows.append(
                [
                    strategy,
                    f"{background.num_bytes / 2**20:,.0f}",
                    f"{waiting.blocked:.2f}",
                    f"{background.blocked:.3f}",
                    f"{share:.1%}",
                    f"{background.seconds:.2f}",
                    f"{background.step_seconds:.2f}",
                ]
            )
    head = ["strategy", "MiB", "synchronous, s", "blocked, s", "share", "in the background, s", "a step, s"]
    text = markdown(head, rows)
    print(text)
    if options.report:
        command = "python benchmarks/checkpoint_speed.py " + " ".join(arguments or sys.argv[1:])
        options.report.write_text(f"# Checkpoints in the background\n\n`{command}`\n\n{environment()}\n\n{text}\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

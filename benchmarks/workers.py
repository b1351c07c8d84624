"""What does Ray cost a run? The same job with Ray's workers, and in processes that torchrun starts.

    python benchmarks/workers.py [--workers 1 2 4 8] [--rounds 3] [--steps 30] [--report OUT.md]

Both run the same loop over the same blocks on CPUs, a thread for each worker: `clm-dist train`, and this program under
torchrun, which calls the loop without Ray. They take turns. A start is from the command to the first step, an
evaluation of the untouched model among it; tokens a second are those of the median step of the fastest round, without
the first two.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from processes import environment, markdown

from clm_dist.config.load import load_job, read_saved_job
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.progress import Silent

SKIPPED = 2
MODEL = {"model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 128}
PROGRAMS = ("clm-dist", "torchrun")


@dataclass(frozen=True)
class Measured:
    start_s: float
    tokens_per_s: float


def write_job(path: Path, workers: int, steps: int) -> None:
    job = {
        "name": "workers",
        "data": {"source": "builtin", "id": "topic", "eval_fraction": 0.02},
        "tokenizer": {"train": {"vocab_size": 4096}},
        "model": {"config": MODEL},
        "batch": {"global_size": 8 * workers, "micro_size": 8},
        "train": {"max_steps": steps, "epochs": 1000},
        "eval": {"every": 10**6},
        "checkpoint": {"every": 10**6},
        # More workers than CPUs share them.
        "cluster": {"workers": workers, "cpus_per_worker": min(1.0, (os.cpu_count() or 1) / workers)},
    }
    path.write_text(yaml.safe_dump(job))


def measure(program: str, directory: Path, job: Path, store: Path, stores: Path, workers: int) -> Measured:
    run = RunDir(Path(tempfile.mkdtemp(dir=directory)) / "workers")
    command = [sys.executable, "-m", "clm_dist", "train", str(job), "--store", str(stores), "--runs", run.root.parent]
    if program == "torchrun":
        own = [__file__, "--loop", str(job), str(store), str(run.root)]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers), *own]
    began = time.time()
    # As Ray and torchrun set it, but for a single process of torchrun.
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, env=threads)
    if done.returncode:
        raise SystemExit(f"{program}: {(done.stdout + done.stderr)[-2000:]}")
    records = list(read_records(run.metrics))
    first = next(r["time"] for r in records if r["kind"] == "phase" and r["phase"] == "Training")
    steps = [r["tokens"] / r["seconds"] for r in records if r["kind"] == "step"]
    return Measured(first - began, statistics.median(steps[SKIPPED:]))


def loop(path: str, store: str, root: str) -> None:
    """Be one process of torchrun."""
    from tests.support.training import train_one

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train_one(read_saved_job(Path(path)), RunDir(Path(root)), Path(store), dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--report", type=Path, help="write the figures as Markdown")
    parser.add_argument("--loop", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.loop:
        loop(*options.loop)
        return 0
    if options.rounds < 1 or options.steps <= SKIPPED:
        parser.error(f"--rounds must be 1 or more, and --steps more than {SKIPPED}")
    from tests.support.stores import prepare

    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for workers in options.workers:
            path = directory / "workers.yaml"
            write_job(path, workers, options.steps)
            store = prepare(load_job(path).config, directory / "stores", Silent())
            found: dict[str, list[Measured]] = {program: [] for program in PROGRAMS}
            for _ in range(options.rounds):
                for program in PROGRAMS:
                    found[program].append(measure(program, directory, path, store, directory / "stores", workers))
            starts = [statistics.median(one.start_s for one in found[program]) for program in PROGRAMS]
            speeds = [max(one.tokens_per_s for one in found[program]) for program in PROGRAMS]
            figures = [f"{start:.1f}" for start in starts] + [f"{speed:,.0f}" for speed in speeds]
            rows.append([str(workers), *figures, f"{speeds[0] / speeds[1]:.3f}"])
            print(rows[-1], flush=True)
    header = ["workers", "start, s", "torchrun's", "tokens/s", "torchrun's", "of torchrun"]
    print(table := markdown(header, rows))
    if options.report:
        command = "python benchmarks/workers.py " + " ".join(arguments or sys.argv[1:])
        load = f"{environment()}; load before: {os.getloadavg()[0]:.1f}"
        options.report.write_text("\n\n".join(["# Ray's workers and torchrun's", f"`{command}`", load, table]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

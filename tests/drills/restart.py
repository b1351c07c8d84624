"""How long a worker's death holds up a run, and what that time consists of.

    python -m tests.drills.restart [--kills 3] [--strategy ddp]

A worker of a run that trains (the tiny job, two workers, `clm-dist run`) is killed with SIGKILL. Printed are the
seconds from its death until Ray Train has noticed it, until the training function runs in new processes (Ray's start of
two actors, their imports, the process group), until the checkpoint is loaded (model, tokenizer, DeepSpeed's or FSDP's
setting up, the check of shared gradients), and until the next step is finished. Exits 1 where one takes 20 s or more.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from clm_dist.train.heartbeat import read_beats
from tests.drills.kills import STRATEGIES, TIMEOUT_S, Drill, DrillError, prepare_drill
from tests.support.runs import metrics_of

BOUND_S = 20.0


def measure(run: Drill, rng: random.Random) -> list[float]:
    """Seconds from a worker's death to each of: noticed, training function entered, loaded, next step finished."""
    run.await_moment("training", rng)
    victim = rng.choice(read_beats(run.run.beats))
    starts = run.num_starts()
    died = time.time()
    os.kill(victim.pid, signal.SIGKILL)
    entered = None
    while run.num_starts() == starts or run.step() <= last_start(run)["step"]:
        if not run.runs or time.time() - died > TIMEOUT_S:
            raise DrillError("the run did not go on")
        beats = read_beats(run.run.beats)
        if entered is None and beats and all(beat.pid != victim.pid for beat in beats):
            entered = time.time()
        time.sleep(0.01)
    records = metrics_of(run.run.metrics)
    noticed = [record["time"] for record in records if record["kind"] == "failure"][-1]
    start = last_start(run)
    step = next(r for r in records if r["kind"] == "step" and r["step"] == start["step"] + 1)
    assert entered
    return [moment - died for moment in (noticed, entered, start["time"], start["time"] + step["seconds"])]


def last_start(run: Drill) -> dict[str, float]:
    return [record for record in metrics_of(run.run.metrics) if record["kind"] == "start"][-1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    options = parser.parse_args(arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="clm-dist-drill-") as temporary:
        run = prepare_drill(Path(temporary), "restart", options.strategy, 100_000, None, environment)
        try:
            run.launch()
            rng = random.Random(0)
            rows = [measure(run, rng) for _ in range(options.kills)]
        finally:
            run.stop()
    print("| | noticed | training function entered | checkpoint loaded | next step finished |")
    print("| --- | ---: | ---: | ---: | ---: |")
    median = [statistics.median(column) for column in zip(*rows, strict=True)]
    for name, row in [*enumerate(rows, 1), ("median", median)]:
        print(f"| {name} | {' | '.join(f'{seconds:.1f} s' for seconds in row)} |")
    return 0 if max(row[-1] for row in rows) < BOUND_S else 1


if __name__ == "__main__":
    sys.exit(main())

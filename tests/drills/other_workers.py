"""Train with 2, then 1, then 3, then 2 workers, and compare with 2 workers that nobody stopped.

    python -m tests.drills.other_workers [--strategies ddp zero1 zero2 zero3 fsdp2]

Each part is `clm-dist run` with nothing changed but `--set cluster.workers=N`; a stop file ends it with a checkpoint.
Of every step the blocks must be the same (a checksum of their numbers and tokens, which each step records), and the
loss within 1e-5 relative, with dropout off. Exits 1 where they are not.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.drills.kills import STRATEGIES, TIMEOUT_S, Drill, DrillError, prepare_drill
from tests.support.runs import metrics_of

BOUND = 1e-5
NUM_STEPS = 400
PARTS = ((2, 50), (1, 150), (3, 250), (2, None))
"""Workers, and the step at which they are told to stop; the last train to the end."""


@dataclass(frozen=True)
class Outcome:
    strategy: str
    starts: list[tuple[int, int]]
    """Workers and first step of each part."""
    same_blocks: bool
    deviation: float
    """The largest relative one of a step's loss."""

    @property
    def passed(self) -> bool:
        return self.same_blocks and self.deviation <= BOUND


def drill(strategy: str, directory: Path, environment: dict[str, str]) -> Outcome:
    directory.mkdir(parents=True)
    whole, cut = (prepare_drill(directory, name, strategy, NUM_STEPS, None, environment) for name in ("whole", "cut"))
    for one in (whole, cut):
        job = yaml.safe_load(one.job.read_text())
        job["model"]["config"] |= {"resid_pdrop": 0.0, "attn_pdrop": 0.0}
        job["batch"] = {"global_size": 6, "micro_size": 2}
        # Three workers on two cores.
        job["cluster"]["cpus_per_worker"] = 0.5
        one.job.write_text(yaml.safe_dump(job))
    with contextlib.ExitStack() as stack:
        for one in (whole, cut):
            stack.callback(one.stop)
        whole.finish()
        for workers, until in PARTS:
            cut.launch(f"cluster.workers={workers}")
            if until is not None:
                stop_at(cut, until)
            assert cut.process
            code = cut.process.wait(TIMEOUT_S)
            if code != (0 if until is None else 75):
                raise DrillError(f"{strategy} with {workers} workers ended with {code}; see {directory / 'log.txt'}")
    return compare(strategy, whole, cut)


def stop_at(run: Drill, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while run.runs and run.step() < step:
        if time.monotonic() > deadline:
            raise DrillError(f"no step {step}; see {run.directory / 'log.txt'}")
        time.sleep(0.05)
    run.run.stop.touch()


def compare(strategy: str, whole: Drill, cut: Drill) -> Outcome:
    steps = [[r for r in metrics_of(one.run.metrics) if r["kind"] == "step"] for one in (whole, cut)]
    if [r["step"] for r in steps[1]] != list(range(1, NUM_STEPS + 1)):
        raise DrillError(f"{strategy}: steps are missing, or came twice")
    starts = [(r["workers"], r["step"]) for r in metrics_of(cut.run.metrics) if r["kind"] == "start"]
    return Outcome(
        strategy,
        starts,
        same_blocks=all(a["blocks"] == b["blocks"] for a, b in zip(*steps, strict=True)),
        deviation=max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(*steps, strict=True)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    options = parser.parse_args(arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    print("| strategy | workers from step | blocks | largest deviation of a loss |\n| --- | --- | --- | ---: |")
    passed = True
    with tempfile.TemporaryDirectory(prefix="clm-dist-drill-") as temporary:
        for strategy in options.strategies:
            try:
                outcome = drill(strategy, Path(temporary) / strategy, environment)
            except DrillError as error:
                print(error)
                print((Path(temporary) / strategy / "log.txt").read_text(errors="replace")[-4000:])
                return 1
            parts = ", ".join(f"{workers} from {step}" for workers, step in outcome.starts)
            blocks = "the same" if outcome.same_blocks else "OTHERS"
            print(f"| {strategy} | {parts} | {blocks} | {outcome.deviation:.1e} |", flush=True)
            passed &= outcome.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

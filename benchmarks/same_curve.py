"""Accumulation, micro-batch and number of workers change no loss curve beyond rounding.

    python benchmarks/same_curve.py [--short] [--report out.md]

One job, a small GPT-2 on the corpus that ships with Python, is trained with one global batch in twelve combinations of
workers (processes in a gloo group, ddp), micro-batch and accumulation: fp32, dropout off, 30 steps. An epoch ends with
a short batch that no micro-batch divides but 1, so the last pass of the epoch has fewer blocks than the others, and
some ranks have none. Printed is how far the loss curve and the final eval loss are from those of the first combination,
as the largest relative deviation of a step.

The last columns show that the check can fail: they are of a plain torch loop with the naive mean of the micro-batches'
means, which is what `loss / accumulation_steps` gives. It weighs the blocks of a short micro-batch too much, and its
curve must break the bound wherever a micro-batch does not divide the short batch. With the right weights the same plain
loop must keep it.

The bound is 1e-5; the exit status is 1 beyond it.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from processes import environment, markdown, run_processes
from transformers import AutoTokenizer

from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job
from clm_dist.files.blocks import Blocks
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import combine
from clm_dist.progress import Silent
from clm_dist.train.batches import BatchOrder
from clm_dist.train.evaluate import EvalSplit, evaluate_micros
from clm_dist.train.forward import WithLoss
from clm_dist.train.local import train_here
from clm_dist.train.loss import next_token_loss
from clm_dist.train.model import load_model
from clm_dist.train.optim import build_optimizer, build_schedule
from clm_dist.train.recorder import Recorder
from tests.support.stores import prepare

JOB = Path(__file__).resolve().parent.parent / "jobs" / "quickstart.yaml"
GLOBAL_SIZE = 12
STEPS = 30
BOUND = 1e-5
SETTINGS = [
    "data.eval_fraction=0.2",
    "data.block_size=96",
    "tokenizer.train.vocab_size=512",
    "model.config.n_embd=64",
    f"batch.global_size={GLOBAL_SIZE}",
    f"train.max_steps={STEPS}",
    "train.epochs=30",
    "train.learning_rate=1e-3",
    "train.warmup_steps=0",
    "eval.every=1000",
    "checkpoint.every=1000",
]


@dataclass(frozen=True)
class Split:
    """How a global batch is computed."""

    workers: int
    micro_size: int

    @property
    def passes(self) -> int:
        """Accumulation: passes of one worker in a step."""
        num_micros = -(-GLOBAL_SIZE // self.micro_size)
        return -(-num_micros // self.workers)


# Five blocks do not divide the batch, and in three of them a worker has nothing to do in the last pass.
SPLITS = [Split(1, 12), Split(1, 6), Split(1, 5), Split(1, 4), Split(1, 1), Split(2, 6)]
SPLITS += [Split(2, 4), Split(2, 1), Split(3, 4), Split(3, 3), Split(3, 2), Split(4, 3)]
SHORT_SPLITS = [Split(1, 12), Split(1, 5), Split(2, 4), Split(3, 2)]


@dataclass(frozen=True)
class Curve:
    losses: list[float]
    eval_loss: float

    def deviation(self, base: "Curve") -> tuple[float, float]:
        """The largest relative deviation of a step's loss, and that of the final eval loss."""
        curve = np.abs(np.array(self.losses) / np.array(base.losses) - 1).max()
        return float(curve), abs(self.eval_loss / base.eval_loss - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="four combinations")
    parser.add_argument("--report", type=Path, help="write the figures as Markdown")
    arguments = parser.parse_args()
    splits = SHORT_SPLITS if arguments.short else SPLITS
    with tempfile.TemporaryDirectory() as directory:
        settings, store, order = prepare_uneven(Path(directory))
        short = len(order.global_batch(order.steps_per_epoch - 1))
        title = (
            f"{STEPS} steps of {GLOBAL_SIZE} blocks; every {order.steps_per_epoch} steps an epoch ends with a batch of "
            f"{short}"
        )
        print(title)

        curves: dict[Split, Curve] = {}
        for workers in sorted({split.workers for split in splits}):
            several = [split for split in splits if split.workers == workers]
            runs = [Path(directory) / f"{split.workers}-{split.micro_size}" for split in several]
            run_processes(train_several, workers, [build_job(settings, split) for split in several], runs, store)
            curves |= {split: curve_of(run) for split, run in zip(several, runs, strict=True)}
        sizes = sorted({split.micro_size for split in splits})
        jobs = [build_job(settings, Split(1, size)) for size in sizes]
        (plain,) = run_processes(train_plainly, 1, [(jobs[-1], False), *((job, True) for job in jobs)], store)
        naive = dict(zip(sizes, plain[1:], strict=True))

    base = curves[splits[0]]
    rows, failures = [], []
    for split in splits:
        curve, final = curves[split].deviation(base)
        naive_curve, naive_final = naive[split.micro_size].deviation(base)
        name = f"{split.workers} x {split.micro_size} x {split.passes}"
        # A micro-batch that holds the whole short batch, or divides it, leaves nothing to weigh.
        uneven = short > split.micro_size and short % split.micro_size != 0
        if max(curve, final) > BOUND:
            failures.append(name)
        if uneven != (naive_curve > BOUND):
            failures.append(f"{name}, naive")
        figures = [f"{figure:.1e}" for figure in (curve, final, naive_curve, naive_final)]
        rows.append([name, repr(curves[split].losses[-1]), *figures[:2], *figures[2:], "yes" if uneven else "no"])
    curve, final = plain[0].deviation(base)
    if max(curve, final) > BOUND:
        failures.append("plain loop")
    rows.append(["plain torch loop", repr(plain[0].losses[-1]), f"{curve:.1e}", f"{final:.1e}", "", "", ""])
    header = ["workers x micro-batch x passes", "loss of the last step", "loss curve", "eval loss"]
    header += ["naive: loss curve", "naive: eval loss", "uneven short batch"]
    verdict = f"Out of bounds: {', '.join(failures)}" if failures else "Every bound is kept."
    fall = f"The loss falls from {base.losses[0]:.3f} to {base.losses[-1]:.3f}."
    text = f"{markdown(header, rows)}\n\n{fall} Bound {BOUND:.0e}. {verdict}"
    print(text)
    if arguments.report:
        arguments.report.write_text(
            f"# The same loss curve\n\n`python benchmarks/same_curve.py`, {environment()}. {title}.\n\n{text}\n"
        )
    return 1 if failures else 0


def build_job(settings: Sequence[str], split: Split) -> JobConfig:
    size = [f"cluster.workers={split.workers}", f"batch.micro_size={split.micro_size}"]
    return load_job(JOB, [*settings, *size]).config


def prepare_uneven(stores: Path) -> tuple[list[str], Path, BatchOrder]:
    """Settings, store and order of the first few records whose last batch in an epoch no micro-batch divides but 1.

    The corpus is another in another version of Python.
    """
    for records in range(6, 60):
        settings = [*SETTINGS, f"data.split='train[:{records}]'"]
        job = build_job(settings, Split(1, 1))
        store = prepare(job, stores, Silent())
        order = BatchOrder.of_job(job, len(Blocks(store, "train")))
        if order.num_blocks % GLOBAL_SIZE in (5, 7, 11) and 2 * order.steps_per_epoch <= STEPS:
            return settings, store, order
    raise SystemExit("the corpus of this Python has no such records")


def train_several(rank: int, world_size: int, jobs: Sequence[JobConfig], runs: Sequence[Path], store: Path) -> None:
    """One process trains several jobs, because each start of processes costs seconds. Collective."""
    for job, root in zip(jobs, runs, strict=True):
        run = RunDir(root)
        run.root.mkdir(parents=True, exist_ok=True)
        split = EvalSplit.of_store(store, job.eval.micro_size)
        checkpoints = Checkpoints.of_run(job, run)
        recorder = Recorder(run, checkpoints, num_micros=split.num_micros, num_tokens=split.num_tokens, keep=2)
        outcome = train_here(job, run, store, recorder, rank=rank, world_size=world_size)
        assert outcome.status == "done", outcome.error


def curve_of(run: Path) -> Curve:
    records = list(read_records(RunDir(run).metrics))
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert len(losses) == STEPS
    return Curve(losses, [record["loss"] for record in records if record["kind"] == "eval"][-1])


def train_plainly(rank: int, world_size: int, jobs: Sequence[tuple[JobConfig, bool]], store: Path) -> list[Curve]:
    """The curves of a plain torch loop in one process: job, and whether it takes the mean of micro-batches' means."""
    return [plain_curve(job, store, naive=naive) for job, naive in jobs]


def plain_curve(job: JobConfig, store: Path, *, naive: bool) -> Curve:
    blocks = Blocks(store, "train")
    order = BatchOrder.of_job(job, len(blocks))
    model = load_model(job, AutoTokenizer.from_pretrained(store / "tokenizer"))
    optimizer, learning_rate = build_optimizer(model, job.train), build_schedule(job.train, order.num_steps)
    losses = []
    for step in range(order.num_steps):
        batch = order.global_batch(step)
        micros = [
            batch[start : start + job.batch.known_micro_size]
            for start in range(0, len(batch), job.batch.known_micro_size)
        ]
        total = 0.0
        for micro in micros:
            ids_BT = torch.from_numpy(blocks[micro])
            mean = next_token_loss(model(input_ids=ids_BT, use_cache=False).logits, ids_BT).mean()
            loss = mean / len(micros) if naive else mean * (len(micro) / len(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        losses.append(total)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        if job.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    split = EvalSplit.of_store(store, job.eval.micro_size)
    evaluated = evaluate_micros(WithLoss(model), split, device=torch.device("cpu"))
    evaluation = combine(
        evaluated, step=order.num_steps, epoch=0.0, num_micros=split.num_micros, num_tokens=split.num_tokens
    )
    return Curve(losses, evaluation.loss)


if __name__ == "__main__":
    sys.exit(main())

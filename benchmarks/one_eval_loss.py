"""One model, one eval split, one loss: at every number of workers and under every strategy.

    python benchmarks/one_eval_loss.py [--short] [--model DIR --data FILE [--rows 1000]] [--report out.md]

By default the model is a small GPT-2 with random weights and the text the corpus that ships with Python, so the
repository is all that it needs; `--model` and `--data` (records in ELI5's shape) measure real ones as well. Each number
of workers is as many processes in a gloo group, in fp32, with the same eval micro-batches. Printed are

1. the eval loss at 1, 2, 3, 4 and 8 workers: clm_dist's with all its digits, the mean of the ranks' means (what an
   average over ranks gives), and what transformers' Trainer prints in as many processes;
2. the eval loss at 2 and 3 workers under ddp, zero2, zero3 and fsdp2, and at other sizes of the micro-batch;
3. what happens when a micro-batch is missing, counted twice, or counted with too few tokens.

Deviations are relative, from clm_dist's loss with 1 worker. The bounds, and an exit status of 1 beyond them:

- Number of workers and strategy: equal to the last bit. In fp32 none of the strategies changes the arithmetic of a
  forward pass: ddp and zero2 hold whole weights, zero3 and fsdp2 gather them, and what is gathered is a copy. Each
  micro-batch runs in one process, and sums are added in the order of the micro-batches. (In the order of the ranks they
  are the same on the built-in text's 44,831 tokens and are not, by 8e-16, on 200,914 of ELI5.)
- Size of the micro-batch: 1e-6. Kernels may split other shapes otherwise, so that float32 sums round differently, and
  the float64 sums are added in another order.

Two things about the Trainer of transformers 5.23 and 5.24. It divides GPT-2's loss by all labels of a block and not by
those that are predicted (see guide_parity.py); `put right` is without that factor, where the Trainer says that it is
needed. And with more than one process it fills the last micro-batch up with blocks from the front of the split, so that
their losses are in its mean.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from processes import environment, markdown, run_processes
from transformers import AutoTokenizer

from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job
from clm_dist.files.blocks import Blocks
from clm_dist.metrics import MicroLoss, combine
from clm_dist.progress import Silent
from clm_dist.train.evaluate import EvalSplit, evaluate_micros
from clm_dist.train.forward import WithLoss
from clm_dist.train.model import load_model
from clm_dist.train.optim import build_optimizer
from clm_dist.train.strategies.build import build_strategy
from clm_dist.train.strategies.environment import forget_accelerate, set_up_worker
from tests.support.stores import prepare

JOBS = Path(__file__).resolve().parent.parent / "jobs"
MICRO_SIZE = 6
WORKERS, SHORT_WORKERS = (1, 2, 3, 4, 8), (1, 2, 3)
STRATEGIES, SHORT_STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2"), ("ddp", "fsdp2")
OTHER_MICRO_SIZES = (1, 5, 32)
ROUNDING = 1e-6

Settings = tuple[Path, list[str]]
"""A job file, and what is changed in it."""


@dataclass(frozen=True)
class Measured:
    """The eval loss of some processes."""

    workers: int
    strategy: str
    micro_size: int
    loss: float
    mean_of_means: float
    num_tokens: int
    parts: tuple[MicroLoss, ...]


@dataclass(frozen=True)
class TrainerLoss:
    printed: float
    put_right: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="three numbers of workers, two strategies, no Trainer")
    parser.add_argument("--model", type=Path, help="directory of a model, instead of random weights")
    parser.add_argument("--data", type=Path, help="records in ELI5's shape, with --model")
    parser.add_argument("--rows", type=int, default=1000, help="records, with --data")
    parser.add_argument("--report", type=Path, help="write the figures as Markdown")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data go together")

    subjects = [("random GPT-2, text that ships with Python", builtin_settings())]
    if arguments.model:
        settings = real_settings(arguments.model, arguments.data, arguments.rows)
        subjects.append((f"{arguments.model.name}, {arguments.rows:,} records", settings))
    sections, failures = [], []
    for name, settings in subjects:
        text, broken = demonstrate(name, settings, short=arguments.short)
        print(f"{text}\n", flush=True)
        sections.append(text)
        failures += broken
    if arguments.report:
        text = "\n\n".join(sections)
        options = f" --model {arguments.model.name} --data {arguments.data.name}" if arguments.model else ""
        heading = f"`python benchmarks/one_eval_loss.py{options}`, {environment()}."
        arguments.report.write_text(f"# One eval loss\n\n{heading}\n\n{text}\n")
    return 1 if failures else 0


def demonstrate(name: str, settings: Settings, *, short: bool) -> tuple[str, list[str]]:
    """The tables of one model on one text, and what is out of bounds."""
    workers = SHORT_WORKERS if short else WORKERS
    strategies = SHORT_STRATEGIES if short else STRATEGIES
    measured: dict[tuple[int, str], Measured] = {}
    trainer: dict[int, TrainerLoss] = {}
    with tempfile.TemporaryDirectory() as directory:
        store = prepare(build_job(settings), Path(directory), Silent())
        split = EvalSplit.of_store(store, MICRO_SIZE)
        for number in workers:
            several = strategies if number in (2, 3) else ("ddp",)
            found = run_processes(measure, number, settings, several, MICRO_SIZE, store, not short)
            for place, strategy in enumerate(several):
                measured[number, strategy] = add_up(split, strategy, [by_strategy[place] for by_strategy, _ in found])
            if found[0][1] is not None:
                trainer[number] = found[0][1]
        other_sizes = [
            add_up(
                replace(split, micro_size=size),
                "ddp",
                [found[0][0] for found in run_processes(measure, 1, settings, ("ddp",), size, store, False)],
            )
            for size in (() if short else OTHER_MICRO_SIZES)
        ]
    base = measured[1, "ddp"]
    refusals = [(what, refusal(parts, split)) for what, parts in wrong_counts(base.parts)]
    failures = out_of_bounds(list(measured.values()), other_sizes, refusals)
    size = split.blocks.block_size
    lines = [
        f"## {name}",
        f"{len(split.blocks):,} eval blocks of {size} tokens in {split.num_micros} micro-batches of {MICRO_SIZE}.",
        worker_table([measured[number, "ddp"] for number in workers], trainer),
        strategy_table([m for m in measured.values() if m.workers in (2, 3)], other_sizes, base),
        "\n".join(f"- {what}: {message or 'COUNTED ALL THE SAME'}" for what, message in refusals),
        f"Out of bounds: {', '.join(failures)}" if failures else "Every bound is kept.",
    ]
    return "\n\n".join(lines), failures


def out_of_bounds(
    measured: Sequence[Measured], other_sizes: Sequence[Measured], refusals: Sequence[tuple[str, str | None]]
) -> list[str]:
    """What breaks a bound; the first of the measured is what the others are compared with."""
    base = measured[0]
    return [
        *(f"{m.workers} workers, {m.strategy}" for m in measured if m.loss != base.loss),
        *(f"micro-batches of {m.micro_size}" for m in other_sizes if not deviation(m, base) <= ROUNDING),
        *(name for name, message in refusals if message is None),
    ]


def builtin_settings() -> Settings:
    """What the repository has: a model with random weights, and the text that ships with Python."""
    small = ["tokenizer.train.vocab_size=1024", "model.config.n_embd=64", "data.eval_fraction=0.2"]
    # Ten times the usual: blocks then have unlike losses, as with a trained model.
    return JOBS / "quickstart.yaml", [*small, "model.config.initializer_range=0.2"]


def real_settings(model: Path, data: Path, rows: int) -> Settings:
    changes = ["data.source=files", f"data.path={data.absolute()}", f"data.split='train[:{rows}]'"]
    return JOBS / "eli5-guide.yaml", [*changes, f"model.path={model.absolute()}"]


def build_job(settings: Settings, workers: int = 1, strategy: str = "ddp") -> JobConfig:
    file, changes = settings
    # Any number of workers up to 8 divides this global batch, of which nothing is trained.
    batch = ["batch.global_size=840", "batch.micro_size=1"]
    cluster = [f"cluster.workers={workers}", f"cluster.strategy={strategy}"]
    return load_job(file, [*changes, *batch, *cluster]).config


def measure(
    rank: int,
    world_size: int,
    settings: Settings,
    strategies: Sequence[str],
    micro_size: int,
    store: Path,
    with_trainer: bool,
) -> tuple[list[list[MicroLoss]], TrainerLoss | None]:
    """This rank's micro-batches under each strategy, and the Trainer's loss. Collective."""
    parts = [
        evaluate_rank(build_job(settings, world_size, strategy), EvalSplit.of_store(store, micro_size), store, rank)
        for strategy in strategies
    ]
    trainer = trainer_loss(build_job(settings), store, micro_size) if with_trainer else None
    return parts, trainer


def evaluate_rank(job: JobConfig, split: EvalSplit, store: Path, rank: int) -> list[MicroLoss]:
    """This rank's micro-batches, evaluated as the training loop does before its first step. Collective."""
    world_size = job.cluster.max_workers
    set_up_worker(rank=rank, world_size=world_size, use_gpu=False, num_threads=1)
    strategy = build_strategy(job, rank=rank, world_size=world_size, use_gpu=False)
    model = load_model(job, AutoTokenizer.from_pretrained(store / "tokenizer"))
    strategy.prepare(WithLoss(model), lambda prepared: build_optimizer(prepared, job.train))
    parts = evaluate_micros(
        strategy.local_model,
        split,
        device=strategy.device,
        rank=rank,
        world_size=world_size,
        in_step=strategy.sharded,
        autocast=strategy.autocast,
    )
    strategy.release()
    forget_accelerate()
    return parts


def trainer_loss(job: JobConfig, store: Path, micro_size: int) -> TrainerLoss:
    """The eval loss of transformers' Trainer in these processes, of the same model and blocks. Collective."""
    from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

    blocks = Blocks(store, "eval")
    ids = [row.tolist() for row in blocks[np.arange(len(blocks))]]
    with tempfile.TemporaryDirectory() as directory:
        trainer: Any = Trainer(
            model=load_model(job, AutoTokenizer.from_pretrained(store / "tokenizer")),
            args=TrainingArguments(
                output_dir=directory,
                per_device_eval_batch_size=micro_size,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                prediction_loss_only=True,
            ),
            eval_dataset=[{"input_ids": row, "labels": row} for row in ids],
            data_collator=default_data_collator,
        )
        trainer.remove_callback(PrinterCallback)
        printed = float(trainer.evaluate()["eval_loss"])
    forget_accelerate()
    size = blocks.block_size
    return TrainerLoss(printed, printed if trainer._loss_shifts_labels else printed * size / (size - 1))


def add_up(split: EvalSplit, strategy: str, by_rank: list[list[MicroLoss]]) -> Measured:
    parts = list(itertools.chain(*by_rank))
    whole = combine(parts, step=0, epoch=0.0, num_micros=split.num_micros, num_tokens=split.num_tokens)
    means = [sum(p.loss_sum for p in own) / sum(p.num_tokens for p in own) for own in by_rank]
    return Measured(
        workers=len(by_rank),
        strategy=strategy,
        micro_size=split.micro_size,
        loss=whole.loss,
        mean_of_means=sum(means) / len(means),
        num_tokens=whole.num_tokens,
        parts=tuple(parts),
    )


def deviation(measured: Measured, base: Measured) -> float:
    return abs(measured.loss / base.loss - 1)


def wrong_counts(parts: Sequence[MicroLoss]) -> list[tuple[str, list[MicroLoss]]]:
    first, *others = parts
    return [
        ("A micro-batch is missing", list(others)),
        ("A micro-batch is counted twice", [*parts, first]),
        ("One is missing and another counted twice", [*others, others[0]]),
        ("A micro-batch has a token less", [replace(first, num_tokens=first.num_tokens - 1), *others]),
    ]


def refusal(parts: list[MicroLoss], split: EvalSplit) -> str | None:
    """The message with which parts are refused; None where they are not."""
    try:
        combine(parts, step=0, epoch=0.0, num_micros=split.num_micros, num_tokens=split.num_tokens)
    except ValueError as error:
        return str(error)
    return None


def worker_table(measured: Sequence[Measured], trainer: dict[int, TrainerLoss]) -> str:
    base = measured[0]
    header = ["workers", "tokens", "clm_dist", "deviation", "mean of rank means", "deviation"]
    rows = []
    if trainer:
        header += ["Trainer, as printed", "put right", "deviation"]
    for m in measured:
        row = [str(m.workers), f"{m.num_tokens:,}", repr(m.loss), f"{deviation(m, base):.1e}"]
        row += [repr(m.mean_of_means), f"{abs(m.mean_of_means / base.loss - 1):.1e}"]
        if m.workers in trainer:
            loss = trainer[m.workers]
            row += [repr(loss.printed), repr(loss.put_right), f"{abs(loss.put_right / base.loss - 1):.1e}"]
        rows.append(row)
    return markdown(header, rows)


def strategy_table(measured: Sequence[Measured], other_sizes: Sequence[Measured], base: Measured) -> str:
    why = {
        "ddp": "whole weights on each rank",
        "zero2": "whole weights on each rank",
        "zero3": "weights gathered: copies",
        "fsdp2": "weights gathered: copies",
    }
    rows = [
        [m.strategy, str(m.workers), str(m.micro_size), repr(m.loss), f"{deviation(m, base):.1e}", "0", why[m.strategy]]
        for m in measured
    ]
    rows += [
        [
            "ddp",
            "1",
            str(m.micro_size),
            repr(m.loss),
            f"{deviation(m, base):.1e}",
            f"{ROUNDING:.0e}",
            "other shapes and sums",
        ]
        for m in other_sizes
    ]
    return markdown(["strategy", "workers", "micro-batch", "eval loss", "deviation", "bound", "arithmetic"], rows)


if __name__ == "__main__":
    sys.exit(main())

"""The training loop. It knows nothing of Ray: what it reports goes through a callable."""

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from clm_dist.config import Every, JobConfig
from clm_dist.errors import RunError
from clm_dist.metrics import flops_per_token, model_flops_utilization
from clm_dist.run_dir import RunDir, writing
from clm_dist.shards import Blocks, Manifest
from clm_dist.train.checkpoint import TrainerState, checkpoint_name, committed, is_committed, read_state
from clm_dist.train.documents import block_logits, document_end_of, find_mixing, num_predicted
from clm_dist.train.evaluate import EvalSplit, evaluate_parts
from clm_dist.train.export import evaluate_export, export
from clm_dist.train.loader import BatchOrder, MicroBatch
from clm_dist.train.model import load_model, next_token_loss
from clm_dist.train.optim import build_optimizer, build_schedule
from clm_dist.train.record import Message, Record
from clm_dist.train.strategy import Strategy, build_strategy, set_up_worker

logger = logging.getLogger(__name__)

Report = Callable[[Message, Path | None, str | None], None]
"""Send a message and, with it, this rank's share of a checkpoint and the checkpoint's name. Collective."""

_REPORT_INTERVAL_S = 1.0
_STOP_INTERVAL_S = 0.5
_COMMIT_POLL_S = 0.02


@dataclass(frozen=True)
class Session:
    """This worker's place in the run, and how it is heard."""

    rank: int
    world_size: int
    use_gpu: bool
    num_threads: int
    run: RunDir
    store: Path
    report: Report


@dataclass(frozen=True)
class Outcome:
    """How the loop ended."""

    status: Literal["done", "preempted", "failed"]
    step: int
    error: str | None = None


def train(job: JobConfig, session: Session) -> Outcome:
    """Train from the last committed checkpoint, or from the start, to the end of the job. Collective.

    Returns:
        done, with the model in `final.unverified` and its evaluation reported; preempted, with a checkpoint, where
        the run's stop file appeared; failed, where the loss is not finite or the ranks disagree. These end on every
        rank alike, so they are returned. What one rank alone meets is raised, and Ray starts the workers again.
    """
    set_up_worker(
        rank=session.rank,
        world_size=session.world_size,
        use_gpu=session.use_gpu,
        num_threads=session.num_threads,
    )
    loop = _Loop(job, session)
    try:
        return loop.run()
    except RunError as error:
        loop.reporter.send()
        return Outcome("failed", loop.step, str(error))


class _Loop:
    """The state of a run on one rank, and its story from the first step to the last."""

    def __init__(self, job: JobConfig, session: Session) -> None:
        from transformers import AutoTokenizer

        self.job, self.session = job, session
        self.reporter = _Reporter(session)
        self.strategy = build_strategy(job, rank=session.rank, world_size=session.world_size, use_gpu=session.use_gpu)
        self.fingerprint = Manifest.read(session.store / "manifest.json").fingerprint
        self.blocks = Blocks(session.store, "train")
        self.document_end = document_end_of(session.store) if job.data.document_mask else None
        self.eval_split = EvalSplit.of_store(session.store, job.eval.micro_size, self.document_end)
        self.order = BatchOrder.of_job(job, len(self.blocks))
        self.learning_rate = build_schedule(job.train, self.order.num_steps)

        model = load_model(job, AutoTokenizer.from_pretrained(session.store / "tokenizer"))
        self.throughput = _Throughput.of_model(model, self.blocks.block_size, self.strategy)
        self.strategy.prepare(model, lambda prepared: build_optimizer(prepared, job.train))
        self.step = 0
        self.saving: str | None = None
        run = hashlib.sha256(str(session.run.root).encode()).hexdigest()[:12]
        self.share_prefix = f"clm-dist-{run}-{session.rank}-"
        for left in Path(tempfile.gettempdir()).glob(f"{self.share_prefix}*"):
            # By a worker of this run that was killed before its share was copied.
            shutil.rmtree(left, ignore_errors=True)

    def run(self) -> Outcome:
        job, order, strategy = self.job, self.order, self.strategy
        strategy.check_gradients_are_shared(self._first_loss)
        self._check_documents_are_apart()
        self.step = self._resume()
        self.reporter.add(
            kind="start",
            step=self.step,
            num_steps=order.num_steps,
            time=time.time(),
            pid=os.getpid(),
            workers=strategy.world_size,
            strategy=job.cluster.strategy,
            device=self.throughput.device_name,
        )
        if self.step == 0:
            self._evaluate()
        self.reporter.phase("Training", self.step)

        strategy.model.train()
        stop = False
        while self.step < order.num_steps and not stop:
            stop = self._train_step()
            last = self.step == order.num_steps
            if self._is_due(job.eval.every) or last:
                self._evaluate()
            if self._is_due(job.checkpoint.every) or last or stop:
                self._save()
            if job.hub.push == "epoch" and self._is_due("epoch") and not last:
                target = self.session.run.exports / f"step-{self.step:08d}"
                export(strategy, self.session.store / "tokenizer", target)
                self.reporter.add(kind="export", step=self.step, epoch=order.epoch(self.step), path=str(target))
                self.reporter.send()
        if self.step < order.num_steps:
            self.reporter.send()
            return Outcome("preempted", self.step)

        self.reporter.phase("Writing the model", self.step)
        unverified = self.session.run.root / "final.unverified"
        export(strategy, self.session.store / "tokenizer", unverified)
        strategy.release()
        self.reporter.phase("Evaluating the written model", self.step)
        parts = evaluate_export(strategy, job, unverified, self.eval_split)
        self.reporter.send_evaluation("verify", self.step, order.epoch(self.step), parts)
        return Outcome("done", self.step)

    def _first_loss(self, model: torch.nn.Module) -> torch.Tensor:
        """The loss of the first block, the same on every rank and each time."""
        # As in training, where activations may be recomputed; dropout is that of the seed.
        model.train()
        torch.manual_seed(self.job.train.seed)
        ids_BT = torch.from_numpy(self.blocks[np.arange(1)]).to(self.strategy.device)
        return next_token_loss(model(input_ids=ids_BT, use_cache=False).logits, ids_BT).mean()

    def _check_documents_are_apart(self) -> None:
        """Raise RunError where the model does not see what `data.document_mask` tells it. Collective."""
        if self.document_end is None:
            return
        strategy = self.strategy
        problem = find_mixing(
            strategy.model if strategy.sharded else strategy.plain_model,
            self.document_end,
            block_size=self.blocks.block_size,
            device=strategy.device,
            precision=self.job.train.precision,
            autocast=strategy.autocast,
            any_rank=lambda found: strategy.all_reduce([float(found)])[0] > 0,
        )
        if problem:
            raise RunError(problem)

    def _num_targets(self, batch: npt.NDArray[np.int64], micros: Sequence[MicroBatch]) -> int:
        """Predicted tokens of a global batch. Collective where documents are masked."""
        if self.document_end is None:
            return len(batch) * (self.blocks.block_size - 1)
        own = (num_predicted(self.blocks[micro.blocks], self.document_end) for micro in micros if micro.counts)
        return int(self.strategy.all_reduce([float(sum(own))])[0])

    def _train_step(self) -> bool:
        """One optimizer step; true when the run is asked to stop."""
        job, strategy = self.job, self.strategy
        began = time.perf_counter()
        data_wait = 0.0
        batch = self.order.global_batch(self.step)
        micros = list(self.order.micro_batches(self.step, strategy.rank, strategy.world_size))
        # Where every document has one token there is nothing to predict, and the loss is 0.
        num_targets = max(1, self._num_targets(batch, micros))
        # Ranks average their gradients; this makes the average the gradient of the mean over all tokens.
        scale = strategy.world_size / num_targets
        loss_sum = torch.zeros((), dtype=torch.float64, device=strategy.device)
        for number, micro in enumerate(micros):
            reading = time.perf_counter()
            ids_BT = torch.from_numpy(self.blocks[micro.blocks]).to(strategy.device)
            data_wait += time.perf_counter() - reading
            torch.manual_seed(_pass_seed(job.train.seed, self.step, micro.index))
            with strategy.one_pass(last=number == len(micros) - 1) as model:
                losses = next_token_loss(block_logits(model, ids_BT, self.document_end), ids_BT, self.document_end)
                strategy.backward(losses.sum() * (scale if micro.counts else 0.0))
            if micro.counts:
                loss_sum += losses.detach().double().sum()

        wishes = self.reporter.wishes()
        total, stops, reports = strategy.all_reduce([loss_sum.item(), *wishes])
        loss = total / num_targets
        if not np.isfinite(loss):
            raise RunError(
                f"the loss of step {self.step + 1} is {loss}; the weights are still those of step {self.step}. It was "
                f"computed on blocks {', '.join(map(str, batch[:16]))}{', ...' if len(batch) > 16 else ''}. Lower "
                "train.learning_rate, add train.warmup_steps or look at the data; the same command goes on from the "
                "last checkpoint"
            )
        rate = self.learning_rate(self.step)
        grad_norm = strategy.step(rate)
        if not np.isfinite(grad_norm) and job.train.precision != "fp16":
            raise RunError(
                f"the gradient of step {self.step + 1} is not finite (loss {loss:.4f}); lower train.learning_rate or "
                "add train.warmup_steps; the same command goes on from the last checkpoint"
            )
        self.step += 1
        seconds = time.perf_counter() - began
        tokens = len(batch) * self.blocks.block_size
        self.reporter.add(
            kind="step",
            step=self.step,
            epoch=self.order.epoch(self.step),
            loss=loss,
            lr=rate,
            grad_norm=grad_norm if np.isfinite(grad_norm) else None,
            tokens=tokens,
            seconds=seconds,
            tokens_per_s=tokens / seconds,
            mfu=self.throughput.utilization(tokens / seconds),
            data_wait=data_wait,
        )
        if reports:
            self.reporter.send()
        return stops > 0

    def _is_due(self, every: Every) -> bool:
        return self.step % (self.order.steps_per_epoch if every == "epoch" else every) == 0

    def _evaluate(self) -> None:
        self.reporter.phase("Evaluating" if self.step else "Evaluating the untouched model", self.step)
        strategy = self.strategy
        parts = evaluate_parts(
            strategy.model if strategy.sharded else strategy.plain_model,
            self.eval_split,
            device=strategy.device,
            rank=strategy.rank,
            world_size=strategy.world_size,
            in_step=strategy.sharded,
            autocast=strategy.autocast,
        )
        self.reporter.send_evaluation("eval", self.step, self.order.epoch(self.step), parts)

    def _save(self) -> None:
        self._await_commit()
        name = checkpoint_name(self.step)
        # On a local disk; the report copies it into the run directory, in the background under Ray.
        share = Path(tempfile.gettempdir()) / f"{self.share_prefix}{name}"
        with writing(share):
            share.mkdir()
            self.strategy.save(share)
            if self.strategy.rank == 0:
                self._state().write(share)
        self.reporter.add(kind="checkpoint", step=self.step)
        self.reporter.send(share, name)
        self.saving = name

    def _state(self) -> TrainerState:
        job = self.job
        return TrainerState(
            step=self.step,
            world_size=self.strategy.world_size,
            strategy=job.cluster.strategy,
            fingerprint=self.fingerprint,
            global_size=job.batch.global_size,
            seed=job.train.seed,
        )

    def _await_commit(self) -> None:
        """Wait for the save in flight: a second one could fill the disk before the first has its marker."""
        while self.strategy.rank == 0 and self.saving and not is_committed(self.session.run.checkpoints / self.saving):
            time.sleep(_COMMIT_POLL_S)

    def _resume(self) -> int:
        """Load the last committed checkpoint; gives the steps that are done. Collective."""
        found: list[Path | None] = [None]
        if self.strategy.rank == 0:
            found[0] = next(reversed(committed(self.session.run.checkpoints)), None)
        # Other nodes may not see the newest marker yet.
        dist.broadcast_object_list(found)
        if found[0] is None:
            return 0
        state = read_state(found[0], self.job, self.strategy.world_size, self.fingerprint)
        self.strategy.load(found[0])
        return state.step


def _pass_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of a pass's dropout: the same whichever rank computes it, and after a resume."""
    return int(np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass
class _Reporter:
    """Gathers rank 0's records and sends them where every rank sends."""

    session: Session
    records: list[Record] = field(default_factory=list)
    sent: float = field(default_factory=time.monotonic)
    looked: float = 0.0

    def add(self, **record: Any) -> None:
        if self.session.rank == 0:
            self.records.append(record)

    def phase(self, name: str, step: int) -> None:
        """Say what begins now. Collective."""
        self.add(kind="phase", step=step, phase=name)
        self.send()

    def wishes(self) -> tuple[float, float]:
        """Whether this rank wants the run to stop, and to report now; rank 0 decides for all."""
        now = time.monotonic()
        if self.session.rank != 0:
            return 0.0, 0.0
        stop = False
        if now - self.looked >= _STOP_INTERVAL_S:
            self.looked = now
            stop = self.session.run.stop.exists()
        return float(stop), float(now - self.sent >= _REPORT_INTERVAL_S)

    def send(self, checkpoint: Path | None = None, name: str | None = None) -> None:
        """Collective."""
        self._report({}, checkpoint, name)

    def send_evaluation(self, kind: str, step: int, epoch: float, parts: list[Any]) -> None:
        """Collective."""
        rows = [(part.index, part.loss_sum, part.num_tokens, part.num_bytes) for part in parts]
        self._report({"evaluation": {"kind": kind, "step": step, "epoch": epoch, "parts": rows}})

    def _report(self, message: Message, checkpoint: Path | None = None, name: str | None = None) -> None:
        self.session.report({"records": self.records, **message}, checkpoint, name)
        self.records = []
        self.sent = time.monotonic()


@dataclass(frozen=True)
class _Throughput:
    flops_a_token: float
    device_name: str
    num_devices: int

    @classmethod
    def of_model(cls, model: Any, block_size: int, strategy: Strategy) -> "_Throughput":
        # ZeRO-3 leaves an empty tensor in a parameter's place and keeps its size beside it.
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        text = model.config.get_text_config()
        layers, hidden = text.num_hidden_layers, text.hidden_size
        is_gpu = strategy.device.type == "cuda"
        name = torch.cuda.get_device_name(strategy.device) if is_gpu else "CPU"
        return cls(flops_per_token(num_parameters, layers, hidden, block_size), name, strategy.world_size)

    def utilization(self, tokens_per_s: float) -> float | None:
        return model_flops_utilization(tokens_per_s, self.flops_a_token, self.device_name, self.num_devices)

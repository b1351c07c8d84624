"""The training loop. It knows nothing of Ray: what it reports goes through a callable.

Over 300 lines, because it is one story from the first step to the last: batch, forward, backward, step, log, evaluate,
save. What decides or computes is in modules of its own.
"""

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from clm_dist.config.job import Every, JobConfig
from clm_dist.errors import ClmDistError, RunError
from clm_dist.files.blocks import Blocks, Manifest
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.markers import BestEval, TrainerState
from clm_dist.files.record_types import OutlierRecord, StepRecord
from clm_dist.pretrained.tokenizer import load_tokenizer
from clm_dist.train.batches import BatchOrder, Feed, MicroBatch, block_checksum, pass_seed
from clm_dist.train.checkpointing.reporter import Reporter, StopCheck, Wish
from clm_dist.train.checkpointing.saver import Saver
from clm_dist.train.checkpointing.saves import NotSavedError, Saves
from clm_dist.train.compiling import reproducible, try_compiling
from clm_dist.train.documents import document_end_of, num_predicted
from clm_dist.train.evaluate import EvalSplit, evaluate_micros, split_loss
from clm_dist.train.export import evaluate_export, export
from clm_dist.train.forward import WithLoss
from clm_dist.train.heartbeat import Heart
from clm_dist.train.memory import Gauge, of_a_pass
from clm_dist.train.micro_search import StoppedError, settle_micro_size
from clm_dist.train.model import load_config, load_model, set_matrix_products
from clm_dist.train.optim import build_optimizer, build_schedule
from clm_dist.train.outliers import (
    MOST_LEFT_OUT,
    SHOWN_BLOCKS,
    BlockLosses,
    Outliers,
    Verdict,
    advise,
    describe_nonfinite,
    gather_losses,
    json_number,
    worst_first,
    write_outlier,
)
from clm_dist.train.session import Session
from clm_dist.train.strategies.base import REPORT_FAULT
from clm_dist.train.strategies.build import build_strategy
from clm_dist.train.strategies.environment import set_up_worker
from clm_dist.train.throughput import Throughput
from clm_dist.train.trial import check_training
from clm_dist.train.unused import find_unused, freeze

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How the loop ended."""

    status: Literal["done", "preempted", "failed"]
    step: int
    error: str | None = None
    try_again: bool = False
    """Whether the same command may get further later, where it failed."""


class _AskedToStopError(Exception):
    """Raised on every rank at once where a run is asked to stop in an evaluation."""


def train(job: JobConfig, session: Session) -> Outcome:
    """Train from the last committed checkpoint, or from the start, to the end of the job. Collective.

    Returns:
        done, with the model in `final.unverified` and its evaluation reported; preempted, with a committed checkpoint,
        where the run's stop file appeared or a rank was asked to stop; failed, where the loss is not finite, the ranks
        disagree or checkpoints cannot be written. These end on every rank alike, so they are returned. What one rank
        alone meets is raised, and Ray starts the workers again.
    """
    set_up_worker(
        rank=session.rank,
        world_size=session.world_size,
        use_gpu=session.use_gpu,
        num_threads=session.num_threads,
        compiles=bool(job.train.compile),
    )
    set_matrix_products(job.train.precision)
    heart = Heart(session.run.beats, session.rank, session.node, job.train.hang_timeout_s)
    try:
        try:
            job, note = settle_micro_size(job, session, heart)
        except StoppedError:
            return Outcome("preempted", 0)
        loop = _Loop(job, session, heart, note)
        try:
            return loop.run()
        except (RunError, NotSavedError) as error:
            with contextlib.suppress(NotSavedError):
                # What was saved until then is worth its commit.
                loop.saves.conclude()
            return Outcome("failed", loop.step, str(error), isinstance(error, NotSavedError))
    finally:
        heart.stop()


class _Loop:
    """The state of a run on one rank, and its story from the first step to the last."""

    def __init__(self, job: JobConfig, session: Session, heart: Heart, note: str | None) -> None:
        self.job, self.session = job, session
        self.heart, self.note = heart, note
        self.tokenizer = load_tokenizer(session.store / "tokenizer")
        # Before DeepSpeed is set up: then transformers shards the parts of a model while they are built.
        unused = find_unused(load_config(job, self.tokenizer), job.data.block_size)
        saver = Saver(Checkpoints.of_run(job, session.run), session.rank, session.world_size)
        self.reporter = Reporter(session, saver, heart)
        self.strategy = build_strategy(job, rank=session.rank, world_size=session.world_size, use_gpu=session.use_gpu)
        self.stops = StopCheck(self.reporter, self.strategy.all_reduce)
        self.fingerprint = Manifest.read(session.store / "manifest.json").fingerprint
        self.saves = Saves(
            job,
            session.run,
            self.fingerprint,
            strategy=self.strategy,
            saver=saver,
            reporter=self.reporter,
            heart=heart,
        )
        self.blocks = Blocks(session.store, "train", shuffled=True)
        self.document_end = document_end_of(session.store) if job.data.document_mask else None
        self.eval_split = EvalSplit.of_store(session.store, job.eval.micro_size, self.document_end)
        self.order = BatchOrder.of_job(job, len(self.blocks))
        self.feed = Feed(self.order, self.blocks, session.rank, session.world_size)
        self.learning_rate = build_schedule(job.train, self.order.num_steps)

        # Random weights that are drawn shard by shard are others.
        with self.strategy.whole_models() if job.model.config else contextlib.nullcontext():
            model = load_model(job, self.tokenizer)
        freeze(model, unused)
        self.throughput = Throughput.of_model(model, self.blocks.block_size, self.strategy)
        self.strategy.prepare(WithLoss(model), lambda prepared: build_optimizer(prepared, job.train))
        self.step = 0
        self.outliers = Outliers(job.train)
        self.gauge = Gauge(self.strategy.device)
        self.owes_evaluation = False
        self.best: BestEval | None = None

    def run(self) -> Outcome:
        job, order, strategy = self.job, self.order, self.strategy
        with of_a_pass():
            check_training(job, strategy, self.blocks, self.document_end)
            self.compilation = try_compiling(
                job,
                strategy,
                self.blocks[order.global_batch(0)[: job.batch.known_micro_size]],
                self.document_end,
                seconds_at_peak=self.throughput.seconds_at_peak(order.num_tokens(self.blocks.block_size)),
            )
        before = self._resume()
        self.reporter.add(
            {
                "kind": "start",
                "step": self.step,
                "num_steps": order.num_steps,
                "time": time.time(),
                "pid": os.getpid(),
                "workers": strategy.world_size,
                "strategy": job.cluster.strategy,
                "device": self.throughput.device_name,
                "owes_evaluation": self.owes_evaluation,
                "micro_size": job.batch.known_micro_size,
                "compiled": self.compilation.compiled,
                "note": ". ".join(filter(None, (self.note, self.compilation.describe(before)))) or None,
            }
        )
        # After the start, which is where those who follow the records begin.
        self._say_damages()
        try:
            return self._train(resumed=before is not None)
        except _AskedToStopError:
            # In an evaluation, which the run then owes.
            if self.saves.saved_step != self.step:
                self._save(owes_evaluation=True)
            return self._end_early()

    def _train(self, *, resumed: bool) -> Outcome:
        job, order, strategy = self.job, self.order, self.strategy
        if self.step == 0 or self.owes_evaluation:
            self._evaluate()
            if self._is_kept() or (job.train.on_nan == "rollback" and not resumed):
                self._save()
        self.reporter.phase("Training", self.step)

        strategy.model.train()
        wish = Wish()
        while not self._is_last() and not wish.stop:
            wish = self._train_step()
            evaluated = self._is_due(job.eval.every) or self._is_last()
            if evaluated:
                self._evaluate()
            last = self._is_last()
            due = self._is_due(job.checkpoint.every) or last or wish.stop or wish.save
            if (evaluated and self._is_kept()) or (due and self.saves.saved_step != self.step):
                self._save()
            if wish.save:
                self.saves.conclude()
                if strategy.rank == 0:
                    self.session.run.save.unlink(missing_ok=True)
            if job.hub.push == "epoch" and self._is_due("epoch") and not last:
                target = self.session.run.exports / f"step-{self.step:08d}"
                export(strategy, self.session.store / "tokenizer", target)
                epoch = order.epoch(self.step)
                self.reporter.add({"kind": "export", "step": self.step, "epoch": epoch, "path": str(target)})
                self.reporter.send()
        if not self._is_last():
            return self._end_early()

        best = self.best if job.train.keep == "best" else None
        kept = best.step if best else self.step
        stopped_early = self.step < order.num_steps
        self.reporter.add({"kind": "final", "step": self.step, "kept": kept, "stopped_early": stopped_early})
        self.reporter.phase("Writing the model", self.step)
        if best and kept < self.step:
            with contextlib.suppress(NotSavedError):
                # Nothing needs the last checkpoint now.
                self.saves.conclude()
            self.saves.load_best(best)
        unverified = self.session.run.root / "final.unverified"
        export(strategy, self.session.store / "tokenizer", unverified)
        self.saves.await_copy()
        strategy.release()
        self.reporter.phase("Evaluating the written model", self.step)
        micros = evaluate_export(strategy, job, unverified, self.eval_split, self._evaluating)
        self.reporter.send_evaluation("verify", kept, order.epoch(kept), micros)
        with contextlib.suppress(NotSavedError):
            # A last checkpoint that cannot be written is recorded, and takes nothing from the model.
            self.saves.conclude()
        return Outcome("done", self.step)

    def _is_last(self) -> bool:
        """Whether training ends after this step: it is the last, or the evaluations no longer get better."""
        limit = self.job.train.stop_after
        best = self.best
        # Only after an evaluation, also where a run that is resumed has just been given a limit.
        converged = limit is not None and best is not None and best.num_since >= limit and best.last == self.step
        return self.step == self.order.num_steps or converged

    def _is_kept(self) -> bool:
        """Whether the weights of this step are those that would be written if no better ones came."""
        return self.job.train.keep == "best" and self.best is not None and self.best.step == self.step

    def _end_early(self) -> Outcome:
        if problem := self.saves.conclude():
            then = "the run stops without it, and the same command goes on from the one before"
            raise NotSavedError(f"{problem}; {then}")
        return Outcome("preempted", self.step)

    def _num_targets(self, num_blocks: int, micros: Sequence[MicroBatch]) -> int:
        """Predicted tokens of a global batch. Collective where documents are masked."""
        if self.document_end is None:
            return num_blocks * (self.blocks.block_size - 1)
        own = (num_predicted(self.blocks[micro.blocks], self.document_end) for micro in micros if micro.counts)
        return int(self.strategy.all_reduce([float(sum(own))])[0])

    def _train_step(self) -> Wish:
        """Make one optimizer step. Return what ranks ask of the run. Collective."""
        job, strategy = self.job, self.strategy
        began = time.perf_counter()
        passes = self.feed.take(self.step)
        data_wait = time.perf_counter() - began
        num_blocks, micros = passes.num_blocks, passes.micros
        # Where every document has one token there is nothing to predict, and the loss is 0.
        num_targets = max(1, self._num_targets(num_blocks, micros))
        # Ranks average their gradients; this makes the average the gradient of the mean over all tokens.
        scale = strategy.world_size / num_targets
        loss_sum = torch.zeros((), dtype=torch.float64, device=strategy.device)
        block_losses: list[tuple[npt.NDArray[np.int64], torch.Tensor]] = []
        checksum = num_computed = 0
        router_sum = torch.zeros((), dtype=torch.float64, device=strategy.device)
        has_router_loss = False
        for number, micro in enumerate(micros):
            reading = time.perf_counter()
            ids = self.blocks[micro.blocks]
            ids_BT = strategy.to_device(ids)
            data_wait += time.perf_counter() - reading
            self.heart.at(self.step, f"pass {number + 1} of {len(micros)}")
            strategy.seed(pass_seed(job.train.seed, self.step, micro.index))
            last = number == len(micros) - 1
            with of_a_pass(), reproducible(self.compilation.compiled), strategy.one_pass(last=last) as model:
                losses, router_loss = model(ids_BT, self.document_end)
                objective = losses.sum()
                if router_loss is not None:
                    weighted = router_loss * num_predicted(ids, self.document_end)
                    objective = objective + weighted
                    has_router_loss = True
                    router_sum += weighted.detach().double() if micro.counts else 0.0
                strategy.backward(objective * (scale if micro.counts else 0.0))
            if micro.counts:
                checksum += block_checksum(micro.blocks, ids)
                num_computed += len(ids)
                loss_sum += losses.detach().double().sum()
                block_losses.append((micro.blocks, losses.detach().mean(dim=-1)))

        own_wish, shared = self.reporter.wishes(), strategy.shared_figures()
        # The one wait for the device in a step, where the strategy has none of its own.
        all_computed, all_checksums, stops, saves, reports, total, router_total, *sums = strategy.all_reduce(
            [num_computed, checksum, *own_wish], [loss_sum, router_sum, *shared]
        )
        if all_computed != num_blocks:
            raise RunError(f"step {self.step + 1} computed {all_computed:.0f} blocks of {num_blocks}. {REPORT_FAULT}")
        strategy.check_shared(sums)
        wish = Wish(stops > 0, saves > 0, reports > 0)
        loss = total / num_targets
        limit = self.outliers.limit()
        # A save that began after the last step may still copy what this update changes.
        self.saves.await_copy()
        rate = self.learning_rate(self.step)
        grad_norm = strategy.step(rate, drop=self.outliers.drops(loss, limit))
        verdict = self.outliers.judge(loss, grad_norm, limit)
        self.step += 1
        if verdict.kind:
            blocks = self._record_outlier(verdict, loss, grad_norm, block_losses)
            if verdict.kind == "nonfinite":
                self._leave_out(verdict.action, loss, blocks)
        if not verdict.is_trained:
            return wish
        seconds = time.perf_counter() - began
        tokens = num_blocks * self.blocks.block_size
        record: StepRecord = {
            "kind": "step",
            "step": self.step,
            "epoch": self.order.epoch(self.step),
            "loss": loss,
            "lr": rate,
            "grad_norm": grad_norm if np.isfinite(grad_norm) else None,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "mfu": self.throughput.utilization(tokens / seconds),
            "data_wait": data_wait,
            "blocks": int(all_checksums),
        }
        if has_router_loss:
            record["router_loss"] = router_total / num_targets
        if (memory := self.gauge.read()) is not None:
            record["memory_bytes"] = memory
        self.reporter.add(record)
        if wish.report:
            self.reporter.send()
        return wish

    def _record_outlier(self, verdict: Verdict, loss: float, grad_norm: float, block_losses: BlockLosses) -> list[int]:
        """Write down the blocks of a step that stands out, and return them, the worst first. Collective."""
        assert verdict.kind
        losses = gather_losses(block_losses, self.strategy.gather)
        blocks = worst_first(self.order.global_batch(self.step - 1), losses)
        if self.strategy.rank == 0:
            record: OutlierRecord = {
                "kind": verdict.kind,
                "step": self.step,
                "loss": json_number(loss),
                "grad_norm": json_number(grad_norm),
                "blocks": blocks[:SHOWN_BLOCKS],
                "action": verdict.action,
            }
            # On a full disk the numbers of the blocks in the record must do.
            with contextlib.suppress(ClmDistError):
                file = self.session.run.outlier(self.step)
                write_outlier(file, record, blocks, losses, blocks=self.blocks, tokenizer=self.tokenizer)
            if verdict.kind == "spike":
                record["limit"] = verdict.limit
            self.reporter.add(record)
        return blocks

    def _leave_out(self, action: str, loss: float, blocks: Sequence[int]) -> None:
        """Do what the job says after a step whose loss or gradient is not finite; no weight has changed. Collective."""
        what = describe_nonfinite(self.step, loss)
        advice = advise(blocks, self.session.run.outlier(self.step))
        if action == "stop":
            self.step -= 1
            raise RunError(
                f"{what}; the weights are still those of step {self.step}. {advice}; the same command goes on from the "
                "last checkpoint, and train.on_nan=skip or rollback goes on by itself"
            )
        if self.outliers.num_left_out > MOST_LEFT_OUT:
            raise RunError(
                f"{what}, and so were {MOST_LEFT_OUT} before it, left out with train.on_nan={action}. {advice}"
            )
        if action == "rollback":
            left_out, best = self.step, self.best
            self.saves.conclude()
            if not self._resume():
                raise RunError(f"{what}, and there is no checkpoint to go back to. {advice}")
            self._say_damages()
            self.reporter.add({"kind": "rollback", "step": left_out, "to": self.step})
            # The weights of then, the blocks from now on: the steps between are skipped.
            self.step, self.best = left_out, best
            # On disk at once, or a restart would train those blocks after all.
            self._save(regular=False, owes_evaluation=self._is_due(self.job.eval.every) or self._is_last())
        self.reporter.send()

    def _is_due(self, every: Every) -> bool:
        return self.step % (self.order.steps_per_epoch if every == "epoch" else every) == 0

    def _evaluate(self) -> None:
        self.reporter.phase("Evaluating" if self.step else "Evaluating the untouched model", self.step)
        strategy = self.strategy
        micros = evaluate_micros(
            strategy.local_model,
            self.eval_split,
            device=strategy.device,
            rank=strategy.rank,
            world_size=strategy.world_size,
            in_step=strategy.sharded,
            autocast=strategy.autocast,
            on_micro=self._evaluating,
        )
        self.reporter.send_evaluation("eval", self.step, self.order.epoch(self.step), micros)
        if self.step:
            loss = split_loss(micros, self.eval_split, strategy.all_reduce)
            self.best = BestEval.with_next(self.best, self.step, loss)

    def _evaluating(self, num_done: int) -> None:
        """Called by every rank after each of its passes. Collective."""
        self.heart.at(self.step, f"evaluating, {num_done} passes done")
        # An evaluation may take longer than what a preemption leaves.
        if self.stops.is_asked(num_done):
            raise _AskedToStopError

    def _save(self, *, regular: bool = True, owes_evaluation: bool = False) -> None:
        """Begin to save. Collective.

        Args:
            regular: because it was due, so the run has come forward.
            owes_evaluation: it was to be evaluated here, and was not.
        """
        if regular and self.job.train.on_nan == "rollback":
            self.outliers.num_left_out = 0
        self.saves.begin(self._state(owes_evaluation), needed=self._is_kept())

    def _resume(self) -> TrainerState | None:
        """Go on from the newest checkpoint that is whole, if there is one, and return its state. Collective."""
        state = self.saves.load_newest()
        if state is not None:
            self.step, self.best = state.step, state.best
            # A run that now ends here may not have evaluated here.
            ends = self.step == self.order.num_steps and (self.best is None or self.best.last != self.step)
            self.owes_evaluation = state.owes_evaluation or ends
            self.outliers.restore(state.recent_losses, state.num_left_out)
        return state

    def _say_damages(self) -> None:
        while self.saves.damages:
            self.reporter.add(self.saves.damages.pop(0))

    def _state(self, owes_evaluation: bool) -> TrainerState:
        job = self.job
        return TrainerState(
            step=self.step,
            num_updates=self.strategy.num_updates,
            world_size=self.strategy.world_size,
            strategy=job.cluster.strategy,
            fingerprint=self.fingerprint,
            global_size=job.batch.global_size,
            seed=job.train.seed,
            scaler=self.strategy.scaler_state(),
            recent_losses=tuple(self.outliers.recent_losses),
            num_left_out=self.outliers.num_left_out,
            parameters=self.strategy.shapes(),
            owes_evaluation=owes_evaluation,
            compiled=self.compilation.compiled,
            best=self.best,
            optimizer=job.train.optimizer,
        )

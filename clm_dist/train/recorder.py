"""The recorder: turns the messages of workers into the run's metrics and commits.

Every rank sends a message at the same points of the run. Rank 0's has the records of the steps since; in an
evaluation each has the micro-batches that the rank ran, and after a save how that ended. The driver's side, `Recorder`,
is the only one that adds losses up, writes metrics.jsonl and commits checkpoints. Messages arrive in order, and a
checkpoint is committed when every rank has said that its file is on the storage.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence

from clm_dist.errors import ClmDistError, RunError
from clm_dist.files.atomic import write_json
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.eval_losses import write_eval_losses
from clm_dist.files.markers import Marker, TrainerState
from clm_dist.files.record_types import CheckpointRecord, EvalRecord, Record
from clm_dist.files.records import append_records, read_records, replace_records
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import Evaluation, MicroLoss, combine
from clm_dist.train.checkpointing.saver import Saved
from clm_dist.train.messages import Message
from clm_dist.train.tensorboard import EventFile

_HANG_S = 60
"""The end of a worker that hangs comes within this time of the reason for it."""


class Recorder:
    """Writes metrics.jsonl and commits checkpoints.

    Args:
        checkpoints: where the run's checkpoints lie.
        num_micros: micro-batches of the eval split.
        num_tokens: predicted tokens of the eval split.
        keep: committed checkpoints that are kept.
        keep_best: whether the model of the best evaluation is, see `train.keep`.
    """

    def __init__(
        self,
        run: RunDir,
        checkpoints: Checkpoints,
        *,
        num_micros: int,
        num_tokens: int,
        keep: int,
        keep_best: bool = False,
        tensorboard: bool = False,
    ) -> None:
        self._run, self._checkpoints, self._keep = run, checkpoints, keep
        self._num_micros, self._num_tokens = num_micros, num_tokens
        self._tensorboard = tensorboard
        self._events: EventFile | None = None
        self._keep_best, self._lowest = keep_best, math.inf
        self._eval_losses: dict[int, float] = {}
        self._saved: dict[str, dict[int, Saved]] = {}
        self._states: dict[str, TrainerState] = {}
        self._heard = time.monotonic()

    def receive(self, messages: Sequence[Message]) -> Evaluation | None:
        """Take what the ranks sent at one point, rank 0 first."""
        records = messages[0].get("records", [])
        evaluation = self._evaluation(messages)
        if evaluation:
            sent = messages[0]["evaluation"]
            record: EvalRecord = {"kind": sent["kind"], **evaluation.figures()}  # type: ignore[typeddict-item]  # no seconds
            if "seconds" in sent:
                record["seconds"] = sent["seconds"]
            records = [*records, record]
            if sent["kind"] == "eval":
                self._eval_losses[evaluation.step] = evaluation.loss
        if starts := [record for record in records if record["kind"] == "start"]:
            # Of workers that died.
            self._saved, self._states, self._eval_losses = {}, {}, {}
            starts[0]["hosts"] = [message["host"] for message in messages if "host" in message]
            starts[0]["startup"] = time.monotonic() - self._heard
        self._append(records)
        self._heard = time.monotonic()
        for rank, message in enumerate(messages):
            if "saved" in message:
                self._saved.setdefault(message["saved"].name, {})[rank] = message["saved"]
            if "state" in message:
                self._states[message["saved"].name] = message["state"]
        for name in [name for name, saved in self._saved.items() if len(saved) == len(messages)]:
            self._conclude_save(name, self._saved.pop(name), self._states.pop(name))
        return evaluation

    def receive_failure(self, rank: int, reason: str) -> None:
        """Take why workers are started again; the rank is the first that failed."""
        with contextlib.suppress(FileNotFoundError):
            if time.time() - self._run.hang.stat().st_mtime < _HANG_S:
                reason = self._run.hang.read_text(encoding="utf-8")
            self._run.hang.unlink()
        records = read_records(self._run.metrics, last_steps=1)
        step = max((record["step"] for record in records if record["kind"] == "step"), default=0)
        self._append([{"kind": "failure", "step": step, "worker": rank, "error": reason, "time": time.time()}])

    def _conclude_save(self, name: str, saved: dict[int, Saved], state: TrainerState) -> None:
        """Commit a checkpoint that every rank has written, or remove one that a rank could not write."""
        record: CheckpointRecord = {"kind": "checkpoint", "step": state.step, "name": name}
        written = [saved[rank].share for rank in sorted(saved)]
        shares = tuple(share for share in written if share is not None)
        if len(shares) < len(saved):
            rank, error = next((rank, one.error) for rank, one in sorted(saved.items()) if one.error)
            record["error"] = f"worker {rank}: {error}"
        else:
            marker = Marker(state, shares, self._eval_losses.get(state.step))
            try:
                with self._checkpoints.saving(name):
                    self._checkpoints.commit(name, marker, self._keep, keep_best=self._keep_best)
            except ClmDistError as error:
                record["error"] = f"its commit: {error}"
                # Rank 0 waits for the commit, or for this.
                write_json(self._run.uncommitted, {"name": name, "error": record["error"]})
            record |= {
                "bytes": marker.num_bytes,
                "seconds": max(one.seconds for one in saved.values()),
                "blocked": max(one.blocked for one in saved.values()),
            }
        if "error" in record:
            # Without a marker it counts for nothing, whether it can be removed or not.
            with contextlib.suppress(Exception):
                self._checkpoints.remove(name)
        self._append([record])

    def _evaluation(self, messages: Sequence[Message]) -> Evaluation | None:
        shares = [message["evaluation"] for message in messages if "evaluation" in message]
        if not shares:
            return None
        micros = [MicroLoss(*micro) for share in shares for micro in share["micros"]]
        try:
            evaluation = combine(
                micros,
                step=shares[0]["step"],
                epoch=shares[0]["epoch"],
                num_micros=self._num_micros,
                num_tokens=self._num_tokens,
            )
        except ValueError as error:
            raise RunError(f"{error}; the committed checkpoints are whole") from error
        # Those of the model that is written in the end.
        if shares[0]["kind"] == "eval" and (not self._keep_best or evaluation.loss <= self._lowest):
            write_eval_losses(self._run, micros)
            self._lowest = evaluation.loss if evaluation.step else math.inf
        return evaluation

    def _append(self, records: Sequence[Record]) -> None:
        if not records:
            return
        starts = [record for record in records if record["kind"] == "start"]
        if starts:
            # In one write: who follows the file sees the new start with what it takes back.
            start = starts[0]
            outlives = outlives_start(start["step"], owes_evaluation=start.get("owes_evaluation", False))

            def keep(record: Record) -> bool:
                kept = outlives(record)
                if not kept and record["kind"] in ("step", "eval"):
                    start["lost"] = start.get("lost", 0.0) + record.get("seconds", 0.0)
                return kept

            replace_records(self._run.metrics, records, keep=keep)
            if self._keep_best:
                evals = (r for r in read_records(self._run.metrics, last_steps=0) if r["kind"] == "eval")
                self._lowest = min((record["loss"] for record in evals if record["step"]), default=math.inf)
        else:
            append_records(self._run.metrics, records)
        if self._tensorboard:
            # Not before there is something to write.
            self._events = self._events or EventFile(self._run.tensorboard)
            self._events.add(records)


def outlives_start(step: int, *, owes_evaluation: bool = False) -> Callable[[Record], bool]:
    """Whether a record stays after a start from a step: not those of steps that are trained again.

    Args:
        owes_evaluation: the step is to be evaluated, again if it was in a part of the run that was lost.
    """

    def outlives(record: Record) -> bool:
        if owes_evaluation and record["kind"] == "eval" and record["step"] == step:
            return False
        return record["kind"] in ("start", "failure") or (record["step"] <= step and step > 0)

    return outlives

"""What a report shows of a run's records, gathered in one pass and in memory that does not grow with the steps."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from clm_dist.files.record_types import FailureRecord, OutlierRecord, Record, StartRecord, StepRecord
from clm_dist.files.standing import Standing
from clm_dist.report.thin import Curve, Marks

MarkKind = Literal["restart", "rollback", "skip", "spike", "problem", "kept", "checkpoint"]
CURVES = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_bytes", "router_loss")


@dataclass
class History(Standing):
    """The curves of a run, what happened on its way, and what it has taken."""

    curves: dict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))
    """By the field of a step's record, where some step has a value; `eval` is the loss of the evaluations."""
    marks: dict[MarkKind, Marks] = field(default_factory=lambda: defaultdict(Marks))
    epoch: float = 0.0
    best_mfu: float = 0.0
    num_starts: int = 0
    compiled: bool = False
    hosts: tuple[str, ...] = ()
    _failure: FailureRecord | None = None

    @classmethod
    def of(cls, records: Iterable[Record]) -> "History":
        """The history that the records of a run tell."""
        history = cls()
        for record in records:
            history.add(record)
        if failure := history._failure:
            history.marks["problem"].add(failure["step"], _describe_failure(failure))
        return history

    def add(self, record: Record) -> None:
        super().add(record)
        if record["kind"] != "step":
            self._mark(record)

    def _add_step(self, record: StepRecord) -> None:
        super()._add_step(record)
        step = record["step"]
        self.epoch = record["epoch"]
        for name in CURVES:
            value = record.get(name)
            # A gradient that is not finite is None; the others are None where they are not known.
            if value is not None or name == "grad_norm":
                self.curves[name].add(step, value)  # type: ignore[arg-type]
        self.best_mfu = max(self.best_mfu, record["mfu"] or 0.0)

    def _mark(self, record: Record) -> None:
        step = record["step"]
        if record["kind"] == "eval":
            self.curves["eval"].add(step, record["loss"])
        elif record["kind"] == "failure":
            self._failure = record
        elif record["kind"] == "checkpoint" and "error" not in record:
            size = f", {record['bytes'] / 1e6:,.1f} MB" if "bytes" in record else ""
            took = f" in {record['seconds']:.1f} s" if "seconds" in record else ""
            self.marks["checkpoint"].add(step, f"checkpoint saved{size}{took}")
        elif record["kind"] == "checkpoint":
            self.marks["problem"].add(step, f"checkpoint not saved: {record.get('error')}")
        elif record["kind"] == "damaged":
            self.marks["problem"].add(step, record["error"])
        elif record["kind"] == "final" and record["kept"] != step:
            # Once: a run that was killed while it wrote its model says it again.
            self.marks["kept"] = Marks()
            self.marks["kept"].add(record["kept"], "the model of this step is kept, whose eval loss is the lowest")
        elif record["kind"] == "rollback":
            self.marks["rollback"].add(step, f"back to the weights of step {record['to']}")
        elif record["kind"] in ("nonfinite", "spike"):
            is_left_out = record["action"] not in ("report", "train")
            self.marks["skip" if is_left_out else "spike"].add(step, _describe_outlier(record))

    def _add_start(self, record: StartRecord) -> None:
        super()._add_start(record)
        self.num_starts += 1
        self.compiled = record.get("compiled", False)
        self.hosts = tuple(dict.fromkeys(record.get("hosts", ())))
        failure, self._failure = self._failure, None
        if self.num_starts > 1:
            lost = f"{record['lost']:,.0f} s of steps trained again" if record.get("lost") else ""
            why = _describe_failure(failure) if failure else ""
            again = f"workers started again, {record['workers']} of them"
            self.marks["restart"].add(record["step"], "; ".join(filter(None, (again, why, lost))))


def _describe_failure(failure: FailureRecord) -> str:
    return f"worker {failure['worker']} failed after step {failure['step']}: {failure['error']}"


def _describe_outlier(record: OutlierRecord) -> str:
    loss = record["loss"] if isinstance(record["loss"], str) else f"{record['loss']:.4g}"
    limit = f", above {record['limit']:.4g}" if "limit" in record else ""
    what = "loss or gradient is not finite" if record["kind"] == "nonfinite" else f"loss stands out{limit}"
    return f"{what} (loss {loss}, gradient norm {record['grad_norm']}): {record['action']}"

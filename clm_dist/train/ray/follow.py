"""The driver's eyes: reads the run's metrics as they come, and shows them."""

from collections.abc import Callable
from pathlib import Path

from clm_dist.files.record_types import Record, StepRecord
from clm_dist.files.records import RecordReader
from clm_dist.files.run_dir import RunDir
from clm_dist.progress import Progress
from clm_dist.timing import Kind

_KINDS: dict[str, Kind] = {"Training": "training", "Writing": "model"}
"""On what the time of a phase is spent, by its first word."""


class Follower:
    """Shows what is added to a run's metrics.

    Args:
        num_starts: how often workers have started before.
        on_export: called with the directory and the step of every model that is written before the end.
        micro_size: blocks of a pass that the job names.
        on_records: called when there were new records.
    """

    def __init__(
        self,
        run: RunDir,
        progress: Progress,
        num_starts: int,
        on_export: Callable[[Path, int], None],
        *,
        micro_size: int | None = None,
        on_records: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._progress, self._num_starts, self._on_export = run, progress, num_starts, on_export
        self._micro_size, self._on_records = micro_size, on_records
        self._reader = RecordReader(run.metrics, from_end=True)
        self._num_steps: int | None = None
        self._step: StepRecord | None = None
        self._perplexity: str | None = None

    def look(self) -> None:
        """Show what is new."""
        records, _ = self._reader.new()
        for record in records:
            self._show(record)
        if records:
            self._on_records()

    def _show(self, record: Record) -> None:
        progress = self._progress
        if record["kind"] == "start":
            self._num_steps = record["num_steps"]
            # The evaluation may be of steps that are trained again.
            self._step = self._perplexity = None
            self._num_starts += 1
            if record["step"]:
                progress.note(f"Resuming from the checkpoint of step {record['step']}")
            elif self._num_starts > 1:
                progress.note("Starting again from step 0: no checkpoint was committed yet")
            before, self._micro_size = self._micro_size, record.get("micro_size")
            if before and self._micro_size != before:
                progress.note(f"A pass has {self._micro_size} blocks now, not {before}; a step has the same blocks")
            if note := record.get("note"):
                progress.note(note)
        elif record["kind"] == "failure":
            progress.note(f"Worker {record['worker']} failed after step {record['step']}: {record['error']}")
            progress.start("Starting workers again", kind="start")
        elif record["kind"] == "damaged":
            progress.note(f"{record['error']}; trying the checkpoint before it")
        elif record["kind"] == "checkpoint":
            progress.spent("checkpoints", record.get("blocked", 0.0))
            if "error" not in record:
                size, seconds = record.get("bytes", 0) / 2**20, record.get("seconds", 0.0)
                progress.note(f"Step {record['step']}: checkpoint saved, {size:,.0f} MiB in {seconds:.1f} s")
            else:
                progress.note(
                    f"The checkpoint of step {record['step']} could not be written, {record['error']}; training goes "
                    "on, and what was committed is whole"
                )
        elif record["kind"] in ("nonfinite", "spike"):
            what = "is far above those before it" if record["kind"] == "spike" else "or its gradient is not finite"
            blocks = ", ".join(map(str, record["blocks"][:4]))
            progress.note(
                f"The loss of step {record['step']} {what} ({record['loss']}; blocks {blocks}, their text is in "
                f"{self._run.outlier(record['step'])}): {record['action']}"
            )
        elif record["kind"] == "rollback":
            progress.note(f"Back to the weights of step {record['to']}; the steps up to {record['step']} are left out")
        elif record["kind"] == "phase":
            training = record["phase"] == "Training"
            progress.start(
                record["phase"],
                total=self._num_steps if training else None,
                unit="step" if training else "",
                kind=_KINDS.get(record["phase"].partition(" ")[0], "evaluation"),
            )
            if training:
                progress.update(record["step"], **self._figures())
        elif record["kind"] == "step":
            self._step = record
            progress.update(record["step"], **self._figures())
        elif record["kind"] == "eval":
            shown = "inf" if record["perplexity"] is None else f"{record['perplexity']:.2f}"
            self._perplexity = shown
            progress.note(
                f"Step {record['step']}, epoch {record['epoch']:.2f}: "
                f"eval loss {record['loss']:.4f}, perplexity {shown}"
            )
            if record["step"] != self._num_steps:
                progress.start("Training", total=self._num_steps, unit="step", kind="training")
                progress.update(record["step"], **self._figures())
        elif record["kind"] == "final":
            if record["stopped_early"]:
                progress.note(f"Stopping early, after step {record['step']}: the evaluations no longer get better")
            if record["kept"] != record["step"]:
                progress.note(f"Keeping the model of step {record['kept']}, which has the lowest eval loss")
        elif record["kind"] == "export":
            self._on_export(Path(record["path"]), record["step"])

    def _figures(self) -> dict[str, str]:
        """The figures of the last step and the last evaluation, the most important first; none before a step."""
        if (step := self._step) is None:
            return {}
        memory = step.get("memory_bytes")
        figures = {
            "loss": f"{step['loss']:.4f}",
            "perplexity": self._perplexity,
            "tokens_per_s": f"{step['tokens_per_s']:,.0f}",
            "epoch": f"{step['epoch']:.2f}",
            "MFU": None if step["mfu"] is None else f"{step['mfu']:.0%}",
            "memory": f"{memory / 2**30:.1f} GiB" if isinstance(memory, int) else None,
        }
        return {name: figure for name, figure in figures.items() if figure is not None}

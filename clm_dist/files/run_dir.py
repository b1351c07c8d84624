"""Every path that a run writes."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """The directory of one run."""

    root: Path

    @property
    def job(self) -> Path:
        """The resolved job; workers read this copy and nothing else."""
        return self.root / "job.yaml"

    @property
    def plan(self) -> Path:
        """What was planned for the run; see `files/plan_file.py`."""
        return self.root / "plan.json"

    @property
    def micro_size(self) -> Path:
        """The blocks of a pass that fit into memory, where the job's did not, or are `auto`."""
        return self.root / "micro_size.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, in the order of the steps."""
        return self.root / "metrics.jsonl"

    @property
    def data(self) -> Path:
        """The manifest of the run's store without its files: what the blocks were made from, and counts of them."""
        return self.root / "data.json"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie unless the job says otherwise."""
        return self.root / "checkpoints"

    @property
    def ray(self) -> Path:
        """Ray Train's own storage of the run."""
        return self.root / "ray"

    @property
    def ray_logs(self) -> Path:
        """Logs of the Ray that the run started by itself, if its last attempt failed."""
        return self.root / "ray-logs"

    @property
    def eval_losses(self) -> Path:
        """The last evaluation by micro-batch; see `files/eval_losses.py`."""
        return self.root / "eval_losses.npy"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def final(self) -> Path:
        """The trained model, a plain Hugging Face directory."""
        return self.root / "final"

    @property
    def samples(self) -> Path:
        """What the untouched and the trained model write after the same prompt; see `files/samples.py`."""
        return self.root / "samples.json"

    @property
    def hashes(self) -> Path:
        """The memory of the hashes of `final`; result.json has those that count."""
        return self.root / "hashes.json"

    @property
    def exports(self) -> Path:
        """Models of earlier epochs that wait for their push."""
        return self.root / "exports"

    @property
    def hub(self) -> Path:
        """The pushes that were made, and the one that is pending."""
        return self.root / "hub.json"

    @property
    def stop(self) -> Path:
        """Once this file is there, the workers save a checkpoint and end."""
        return self.root / "stop"

    @property
    def save(self) -> Path:
        """Once this file is there, the workers save a checkpoint, remove it and go on."""
        return self.root / "save"

    @property
    def beats(self) -> Path:
        """The last sign of life of each worker, while workers run."""
        return self.root / "beats"

    @property
    def hang(self) -> Path:
        """Why the driver ends workers that hang, until that is recorded."""
        return self.root / "hang.txt"

    @property
    def uncommitted(self) -> Path:
        """Name of the last checkpoint that every worker wrote and that could not be committed, and why."""
        return self.root / "uncommitted.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def trackers(self) -> Path:
        """What is kept of other trackers, and what they write; for the run's user alone."""
        return self.root / "trackers"

    def tracker_state(self, name: str) -> Path:
        """The id of the run at a tracker, and what was sent; see `train/trackers/send.py`."""
        return self.trackers / f"{name}.json"

    def tracker_log(self, name: str) -> Path:
        """What the process of a tracker says."""
        return self.trackers / f"{name}.log"

    def outlier(self, step: int) -> Path:
        """The blocks of a step whose loss or gradient stood out, with their text."""
        return self.root / "outliers" / f"step-{step:08d}.json"

    def exists(self) -> bool:
        return self.job.is_file()

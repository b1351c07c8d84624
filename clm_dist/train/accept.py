"""The written model accepted as the one that was trained."""

from clm_dist.config.job import JobConfig
from clm_dist.errors import RunError
from clm_dist.files.atomic import replace_dir
from clm_dist.files.final import hash_final
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir

# Reading the model back runs the same arithmetic on the same weights; sharding adds rounding.
_VERIFY_TOLERANCE = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-3, "fp16": 1e-3}


def accept_export(job: JobConfig, run: RunDir) -> dict[str, str]:
    """Put the written model into place as `final`, once its loss is known to be that of the trained model.

    Returns:
        the sha256 of each of its files; see `hash_final`.

    Raises:
        RunError: the losses differ; the model stays where it was written.
    """
    losses: dict[tuple[str, int], float] = {}
    kept = 0
    for record in read_records(run.metrics, last_steps=0):
        if record["kind"] in ("eval", "verify"):
            losses[record["kind"], record["step"]] = record["loss"]
        elif record["kind"] == "final":
            kept = record["kept"]
    if missing := {("eval", kept), ("verify", kept)} - losses.keys():
        raise RunError(
            f"{run.metrics} has no evaluation of step {kept}, whose model is written ({missing.pop()[0]}); it is in "
            f"{run.root / 'final.unverified'}, and the checkpoints are whole. This is a fault of clm-dist: please "
            "report it"
        )
    trained, written = losses["eval", kept], losses["verify", kept]
    unverified = run.root / "final.unverified"
    tolerance = _VERIFY_TOLERANCE[job.train.precision]
    if not abs(written - trained) <= tolerance * abs(trained):
        raise RunError(
            f"the written model evaluates to a loss of {written:.6f}, the trained one to {trained:.6f}; it is left in "
            f"{unverified}, and the checkpoints are whole. This is a fault of clm-dist: please report it"
        )
    replace_dir(unverified, run.final)
    return hash_final(run)

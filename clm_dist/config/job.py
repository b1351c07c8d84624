"""The job file's sections: one typed, frozen model each; unknown keys are refused."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from clm_dist.config.data import DataConfig, TokenizerConfig
from clm_dist.config.hub import HubConfig
from clm_dist.config.k8s import K8sConfig
from clm_dist.config.model import ModelConfig
from clm_dist.config.section import MOST, Count, ExtensionName, Section, Seed, wrong
from clm_dist.config.slurm import SlurmConfig

Every = Literal["epoch"] | Count
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
Schedule = Literal["linear", "cosine", "constant", "polynomial", "inverse_sqrt", "wsd"]


class BatchConfig(Section):
    """How many blocks a step and a pass take."""

    global_size: Count = 8
    """Blocks in an optimizer step, over all workers."""
    micro_size: Literal["auto"] | Count = 8
    """Blocks in one forward and backward pass on one device; `auto` tries, once a run, how many fit into memory, or on
    CPUs how many are fastest."""

    @property
    def known_micro_size(self) -> int:
        """`micro_size`; 1 where it is still to be found."""
        return 1 if self.micro_size == "auto" else self.micro_size

    @property
    def num_micros(self) -> int:
        """Micro-batches of a step; the last may be short."""
        return -(-self.global_size // self.known_micro_size)

    def even_micro_size(self, most: int, world_size: int) -> int:
        """The fewest blocks of a pass with which a step has no more passes than with `most` blocks."""
        passes = -(-self.global_size // (most * world_size))
        return -(-self.global_size // (passes * world_size))

    def passes_per_step(self, world_size: int) -> int:
        """Forward and backward passes of each worker in a step (gradient accumulation)."""
        return -(-self.num_micros // world_size)


class TrainConfig(Section):
    """The optimizer and its schedule."""

    epochs: Count = 3
    """Passes over the training blocks."""
    max_steps: Count | None = None
    """End after this many steps; the schedule ends there too, unless `schedule_steps` says otherwise."""
    schedule_steps: Count | None = None
    """Steps that the schedule is made for; null is those of the run. With the steps that the run is to have in the end,
    `max_steps` can be raised on a resume and changes no rate."""
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-5
    """Peak learning rate."""
    optimizer: Literal["adamw"] | ExtensionName = "adamw"
    """`adamw`, or the name of an entry point `clm_dist.optimizers` of an installed package; see docs/extend.md."""
    optimizer_options: dict[str, JsonValue] = {}
    """Whatever that optimizer of a package takes besides the learning rate and the weight decay."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay."""
    decay_bias_and_norm: bool = True
    """Decay biases and normalisation weights as well, as plain AdamW does."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first moment decay."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second moment decay."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up; `wsd` holds it, and lowers it in a line at the end (`decay_ratio`)."""
    warmup_steps: Annotated[int, Field(ge=0, le=MOST)] = 0
    """Steps in which the learning rate rises from 0."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the run's steps in which it rises, instead of `warmup_steps`."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the run's steps, the last ones, in which `wsd` lowers it."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the gradient to this 2-norm; null leaves it."""
    precision: Precision = "fp32"
    """Arithmetic of the passes; weights and optimizer keep fp32 masters. `tf32` is fp32, but matrix products of a
    GPU keep 10 bits of their factors."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: Literal["auto"] | bool = False
    """Compile the passes of training with torch.compile, from ids to losses; where a model cannot be, a line
    says why, and it runs as before. `auto` does it on a GPU where the run is long enough to repay half a minute of
    compiling, and where it stays the same to the last bit each time."""
    seed: Seed = 42
    """Seed of the weights, the order of blocks and dropout."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """Where the loss or the gradient is not finite: end the run, leave the step out, or go back to the last
    checkpoint's weights and skip the steps since. No update is made in any case."""
    on_spike: Literal["report", "skip"] = "report"
    """Where the loss is far above that of the last 128 steps: say so, or leave the step out as well."""
    keep: Literal["last", "best"] = "last"
    """The model that is written in the end: that of the last step, or that of the evaluation with the lowest loss since
    training began, for which a checkpoint is saved at each evaluation that is better than those before."""
    stop_after: Count | None = None
    """End after this many evaluations in a row that are no better than the best before them (early stopping)."""
    max_failures: Annotated[int, Field(ge=0, le=MOST)] = 3
    """How often dead or hanging workers are replaced, from the last committed checkpoint, before the run fails."""
    hang_timeout_s: Annotated[float, Field(ge=2)] | None = 1200
    """Seconds without any progress within which the worker that the others wait for is named and the workers are
    replaced; longer than the longest pass, load or writing of the model. Null waits for ever."""
    start_timeout_s: Annotated[float, Field(ge=30)] | None = 1800
    """Seconds within which workers begin to train, again after a failure too; the run waits so long for nodes that are
    lost to come back. Null waits for ever."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_ratio is not None and self.warmup_steps:
            raise wrong("train.warmup_ratio", "train has warmup_steps and warmup_ratio; leave one of them out")
        if self.schedule == "wsd" and (self.warmup_ratio or 0) + self.decay_ratio > 1:
            raise wrong(
                "train.decay_ratio",
                f"train.warmup_ratio {self.warmup_ratio} and train.decay_ratio {self.decay_ratio} are more than the "
                "whole run; lower one of them",
            )
        return self

    @model_validator(mode="after")
    def _options_are_of_the_optimizer(self) -> Self:
        of_adamw = ("adam_beta1", "adam_beta2", "adam_epsilon")
        for name in ("optimizer_options",) if self.optimizer == "adamw" else of_adamw:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise wrong(f"train.{name}", f"train.{name} is not for train.optimizer {self.optimizer}; remove it")
        return self

    def num_warmup_steps(self, num_steps: int) -> int:
        """Steps of the warm-up of a run of `num_steps`."""
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(self.warmup_ratio * num_steps)


class EvalConfig(Section):
    """When the eval split is evaluated; the untouched and the final model always are."""

    every: Every = "epoch"
    """`epoch`, or a number of steps."""
    micro_size: Count = 8
    """Blocks in one forward pass on one device."""


class CheckpointConfig(Section):
    """When the training state is saved; the last step always is."""

    every: Every = "epoch"
    """`epoch`, or a number of steps."""
    keep: Annotated[int, Field(ge=2, le=MOST)] = 2
    """Newest checkpoints that are kept, two or more; the one with the best eval loss is also kept."""
    path: str | None = None
    """Directory or URL (s3://, gs://, ...) under which the checkpoints of the run lie, by its name; null is the run
    directory."""


class ClusterConfig(Section):
    """Workers and what each of them gets."""

    workers: Count | tuple[Count, Count] = 1
    """Ray Train workers, one device each; `[2, 8]` takes as many as there are, and follows nodes that go and come."""
    strategy: Strategy = "ddp"
    """Sharded over the workers: nothing, optimizer (zero1), gradients (zero2), weights (zero3, fsdp2)."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Kept in host memory between uses: nothing, the optimizer (zero1-3), weights too (zero3, fsdp2)."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that Ray reserves for a worker; it computes with as many threads."""
    gpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=0, le=1)] = "auto"
    """GPUs of a worker, 0 or 1; `auto` takes one where the cluster has any."""
    slurm: SlurmConfig = SlurmConfig()
    """Resources and options of `clm-dist submit slurm`."""
    k8s: K8sConfig = K8sConfig()
    """Resources and options of `clm-dist submit k8s`."""

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def elastic(self) -> bool:
        return self.min_workers < self.max_workers

    @model_validator(mode="after")
    def _workers_are_a_range(self) -> Self:
        if self.min_workers > self.max_workers:
            problem = f"cluster.workers {list(self.workers)} is no range; the smaller number comes first"  # type: ignore[arg-type]
            raise wrong("cluster.workers", problem)
        return self

    @model_validator(mode="after")
    def _offload_fits(self) -> Self:
        fits = {"optimizer": ("zero1", "zero2", "zero3"), "all": ("zero3", "fsdp2")}
        if self.offload != "none" and self.strategy not in fits[self.offload]:
            raise wrong(
                "cluster.offload",
                f"cluster.offload {self.offload} is not supported with {self.strategy}; "
                f"it works with {', '.join(fits[self.offload])}",
            )
        return self


class JobConfig(Section):
    """A whole job: which text, which model, how it is trained, and where the result goes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=96)]
    """Name of the run, and of its directory."""
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    batch: BatchConfig = BatchConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    hub: HubConfig = HubConfig()
    tracking: list[Literal["tensorboard", "wandb", "mlflow", "trackio", "comet", "prometheus"] | ExtensionName] = []
    """Trackers that receive the metrics: tensorboard writes event files into the run directory; the others take
    login and project from their own environment variables, see docs/trackers.md. Any other name is that of an entry
    point `clm_dist.trackers` of an installed package, see docs/extend.md."""

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.tokenizer_path is None and self.tokenizer.train is None:
            raise wrong(
                "tokenizer",
                "tokenizer needs path or train, because model.config has no tokenizer of its own",
                "model.config",
            )
        workers, micros = self.cluster.max_workers, self.batch.num_micros
        if workers > micros:
            size, micro = self.batch.global_size, self.batch.known_micro_size
            advice = f"set batch.global_size to {workers * micro}"
            if size >= workers:
                advice += f", or batch.micro_size to {size // workers}"
            problem = f"batch.global_size {size} is {micros} x {micro} blocks, too few for {workers} workers; {advice}"
            raise wrong("batch.global_size", problem, "cluster.workers", "batch.micro_size")
        if self.train.precision == "fp16" and self.cluster.strategy == "fsdp2":
            raise wrong("train.precision", "train.precision fp16 is not supported with fsdp2; use bf16")
        if self.train.precision in ("fp32", "tf32") and "flash" in self.model.attention:
            problem = (
                f"model.attention {self.model.attention} computes in half precision alone; set train.precision to bf16"
            )
            raise wrong("model.attention", problem, "train.precision")
        return self

    def with_micro_size(self, size: int) -> Self:
        """The same job with so many blocks in a pass."""
        return self.model_copy(update={"batch": self.batch.model_copy(update={"micro_size": size})})

    @property
    def tokenizer_path(self) -> str | None:
        """Directory or Hub id of the tokenizer; None when it is to be trained."""
        return None if self.tokenizer.train else self.tokenizer.path or self.model.path

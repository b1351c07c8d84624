"""Memory of a worker's device in training, part by part, for every strategy.

What weights, gradients and optimizer take under ZeRO is the table of Rajbhandari et al. 2020 ("ZeRO: Memory
Optimizations Toward Training Trillion Parameter Models", figure 1), with the buffers that DeepSpeed 0.19 and torch's
FSDP2 have beside it. A test holds each strategy against what torch allocates.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from clm_dist.config.job import JobConfig
from clm_dist.plan.activations import Arithmetic, layer_bytes, loss_bytes
from clm_dist.plan.architecture import Architecture
from clm_dist.train.compile_cost import is_worth_it
from clm_dist.train.loss_parts import tokens_at_once

CONTEXT_BYTES = 2**30
"""Of a GPU that CUDA, its libraries and NCCL take before the first tensor; about 0.5 to 1.5 GiB on an H200."""
USABLE = 0.95
"""Share of a device that tensors can take; the rest is lost between them."""
_BUCKET = 5 * 10**8
"""The most elements of DeepSpeed's buffer for gradients, `reduce_bucket_size`."""
_MOST_BLOCKS = 2**20
_LIVE = 10**9
"""Elements that ZeRO-3 keeps gathered, `stage3_max_live_parameters`."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a worker's device when it takes most, by what they hold."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    """AdamW's moments, and fp32 masters of weights that are in half precision or sharded."""
    copies: float = 0.0
    """Weights in half precision that autocast keeps for a pass."""
    activations: float = 0.0
    """What the layers keep for the backward pass."""
    loss: float = 0.0
    """Logits or their gradient, and what is computed from them."""
    buffers: float = 0.0
    """Weights that are gathered for a pass, and gradients that are exchanged."""
    context: float = 0.0
    """CUDA and its libraries."""

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))


@dataclass(frozen=True)
class Setting:
    """What the memory of a worker depends on, besides its model."""

    strategy: str
    world_size: int
    micro_size: int
    block_size: int
    passes: int = 1
    """Passes of a step."""
    precision: str = "fp32"
    offload: str = "none"
    gradient_checkpointing: bool = False
    wants_compiled: bool = False
    is_eager: bool = False
    is_gpu: bool = True
    eval_micro_size: int = 0
    """Blocks of a pass of an evaluation."""
    global_size: int | None = None
    """Blocks of a step, over all workers; None where all passes are full."""

    @classmethod
    def of_job(
        cls, job: JobConfig, world_size: int, *, is_gpu: bool, seconds_at_peak: float | None = None
    ) -> "Setting":
        """The setting of a job on a number of workers.

        Args:
            seconds_at_peak: see `is_worth_it`, by which `train.compile: auto` goes.
        """
        wanted = job.train.compile
        return cls(
            strategy=job.cluster.strategy,
            world_size=world_size,
            micro_size=min(job.batch.known_micro_size, job.batch.global_size),
            block_size=job.data.block_size,
            passes=job.batch.passes_per_step(world_size),
            precision=job.train.precision,
            offload=job.cluster.offload,
            gradient_checkpointing=job.train.gradient_checkpointing,
            wants_compiled=wanted is True or (wanted == "auto" and is_worth_it(seconds_at_peak)),
            is_eager=job.model.attention == "eager",
            is_gpu=is_gpu,
            eval_micro_size=job.eval.micro_size,
            global_size=job.batch.global_size,
        )

    @property
    def is_compiled(self) -> bool:
        """Whether passes are compiled: ZeRO-3 gathers weights inside of a pass, which cannot be."""
        return self.wants_compiled and self.strategy != "zero3"

    @property
    def blocks_of_step(self) -> int:
        """Blocks that the worker with most to do computes in a step.

        A short last pass spares time to a single worker only: of several, others compute a full one meanwhile.
        """
        full = self.passes * self.micro_size
        return full if self.world_size > 1 or self.global_size is None else min(full, self.global_size)

    @property
    def arithmetic(self) -> Arithmetic:
        is_half = self.precision in ("bf16", "fp16")
        return Arithmetic(is_half, is_autocast=self.strategy == "ddp" or not is_half, is_gpu=self.is_gpu)


def estimate_memory(model: Architecture, setting: Setting) -> Memory:
    """The memory of a worker's device at the moment of a step at which it takes most.

    That is one of five: the loss is computed; the backward pass begins; it ends; the weights are updated; the loss of
    an evaluation is computed. Activations go while gradients come.
    """
    full = _STATES[setting.strategy](model, setting)
    inputs, layer, loss = _of_pass(model, setting)
    # Of an earlier pass, or in the buckets of DistributedDataParallel, or in the buffer of ZeRO-3.
    stay = setting.passes > 1 or setting.strategy == "zero3" or (setting.strategy == "ddp" and setting.world_size > 1)
    before = full if stay else replace(full, gradients=0.0)
    at_loss = replace(before, activations=inputs, loss=loss)
    if setting.strategy in ("zero1", "zero2"):
        # Their buffers come with the first gradient.
        at_loss = replace(at_loss, buffers=0.0)
    at_begin = replace(before, activations=inputs + layer)
    at_end = replace(full, copies=0.0)
    if model.is_tied and setting.strategy in ("ddp", "zero1", "zero2"):
        # The gradients of head and embedding, before they are added up; autocast's are added in place.
        is_half = setting.arithmetic.is_half
        each = 8 if not is_half else 4 if setting.strategy == "ddp" else 0
        at_end = replace(at_end, gradients=at_end.gradients + each * model.vocabulary * model.hidden)
    in_eval = replace(before, copies=full.copies, loss=_eval_loss(model, setting))
    if setting.strategy in ("zero1", "zero2"):
        in_eval = replace(in_eval, buffers=0.0)
    in_update = _in_update(full, model, setting)
    most = max(at_loss, at_begin, at_end, in_update, in_eval, key=lambda memory: memory.total)
    return replace(most, context=float(CONTEXT_BYTES) if setting.is_gpu else 0.0)


def _eval_loss(model: Architecture, setting: Setting) -> float:
    """Bytes of the logits of an evaluation's pass, and of fp32 tensors for the tokens whose loss is computed at once.

    These are log-probabilities, and in half precision a copy of the logits.
    """
    arithmetic, num_tokens = setting.arithmetic, setting.eval_micro_size * setting.block_size
    at_once = min(num_tokens, tokens_at_once(model.vocabulary, on_cpu=not arithmetic.is_gpu))
    return model.vocabulary * (num_tokens * arithmetic.size + at_once * (8 if arithmetic.is_half else 4))


def _in_update(full: Memory, model: Architecture, setting: Setting) -> Memory:
    own = model.num_parameters / setting.world_size
    if setting.strategy in ("zero1", "zero2"):
        # The worker's own part of the gradient, in a flat tensor and in fp32 as well.
        return replace(full, copies=0.0, buffers=0.0, gradients=0.0 if setting.offload != "none" else 8 * own)
    if setting.strategy == "zero3" and setting.arithmetic.is_half:
        size, number = setting.arithmetic.size, model.num_parameters
        # Nothing is gathered then, or exchanged.
        buffers = full.buffers - size * (min(number, _LIVE) + min(number, _BUCKET))
        return replace(full, gradients=full.gradients + 6 * own, buffers=buffers)
    return replace(full, copies=0.0)


def host_bytes(model: Architecture, setting: Setting) -> float:
    """Bytes of host memory of a worker: what is offloaded, and the copy of a checkpoint that is being written."""
    size, masters = setting.arithmetic.size, 12 * model.num_parameters / setting.world_size
    offloaded = 0.0
    if setting.offload != "none":
        offloaded += masters + 4 * model.num_parameters / setting.world_size
    if setting.offload == "all" and setting.strategy == "zero3":
        offloaded += size * model.num_parameters / setting.world_size
    return masters + offloaded


def largest_micro_size(model: Architecture, setting: Setting, memory_bytes: float) -> int:
    """The most blocks in a pass that fit a device; 0 where not even one does."""

    def fits(size: int) -> bool:
        return fits_device(estimate_memory(model, replace(setting, micro_size=size)), memory_bytes)

    low, high = 0, _MOST_BLOCKS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fits_device(memory: Memory, memory_bytes: float) -> bool:
    """Whether it fits a device with so much memory."""
    return memory.total <= USABLE * memory_bytes


def _of_pass(model: Architecture, setting: Setting) -> tuple[float, float, float]:
    """Bytes of a pass: what is kept of all layers until the loss, what one layer keeps beside, and head and loss."""
    arithmetic, tokens = setting.arithmetic, setting.micro_size * setting.block_size
    each = layer_bytes(
        model, setting.block_size, arithmetic, is_eager=setting.is_eager, is_compiled=setting.is_compiled
    )
    loss = loss_bytes(model, tokens, arithmetic, is_compiled=setting.is_compiled)
    if setting.gradient_checkpointing:
        # The input of each layer; in the backward pass one layer after the other is computed again, and while all that
        # it keeps is still there, its gradients begin with those of its widest tensors.
        each += 2 * model.intermediate * arithmetic.size
        return tokens * model.num_layers * model.hidden * arithmetic.stream_size, tokens * each, loss
    return tokens * model.num_layers * each, 0.0, loss


def _ddp(model: Architecture, setting: Setting) -> Memory:
    number = model.num_parameters
    copies = 2 * model.multiplied if setting.arithmetic.is_half else 0
    return Memory(weights=4 * number, gradients=4 * number, optimizer=8 * number, copies=copies)


def _zero(model: Architecture, setting: Setting) -> Memory:
    number, world, size = model.num_parameters, setting.world_size, setting.arithmetic.size
    stage, offloads = int(setting.strategy[-1]), setting.offload != "none"
    buffers = float(size * min(number, _BUCKET))
    if stage == 3:
        weights = 0.0 if setting.offload == "all" else size * number / world
        gradients = size * number / world
        buffers += size * (min(number, _LIVE) + min(number, _BUCKET))
    elif stage == 2:
        weights, gradients = size * number, size * number / world
        # What other workers keep of a bucket.
        buffers += size * min(number, _BUCKET) * (1 - 1 / world)
    else:
        weights = gradients = size * number
    optimizer = 0.0 if offloads else 12 * number / world
    return Memory(weights=weights, gradients=gradients, optimizer=optimizer, buffers=buffers)


def _fsdp2(model: Architecture, setting: Setting) -> Memory:
    number, world, size = model.num_parameters, setting.world_size, setting.arithmetic.size
    shards = 0.0 if setting.offload == "all" else 1 / world
    # Gathered: a layer and the next. Exchanged: a layer's gradient, of half precision in fp32 as well.
    of_layer = 2 * size + (size + (4 if setting.arithmetic.is_half else 0) if world > 1 else 0)
    buffers = of_layer * model.layer_parameters + 2 * size * model.outer_parameters
    return Memory(
        weights=4 * number * shards,
        gradients=4 * number * shards,
        optimizer=8 * number * shards,
        buffers=buffers,
    )


_STATES: dict[str, Callable[[Architecture, Setting], Memory]] = {
    "ddp": _ddp,
    "zero1": _zero,
    "zero2": _zero,
    "zero3": _zero,
    "fsdp2": _fsdp2,
}

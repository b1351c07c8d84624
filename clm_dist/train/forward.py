"""What a model computes of whole blocks: the losses of their tokens, the logits, and the loss of its router."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from clm_dist.errors import ClmDistError, ConfigError, first_line
from clm_dist.train.attention import attention_of
from clm_dist.train.documents import document_positions
from clm_dist.train.loss import next_token_loss

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
# Of a device or of another rank, which may be well the next time; torch has no class for most of them.
_PASSING = re.compile(r"CUDA|NCCL|out of memory|alloc|[Cc]onnection|gloo|[Ss]ocket|[Tt]imed? ?out|process group|store")


class Prediction(NamedTuple):
    """What a model computes of whole blocks."""

    logits: Tensor
    """After each token, (B, T, V)."""
    router_loss: Tensor | None
    """The term that a mixture of experts adds to its training loss so that its experts are used evenly, (), nats; None
    for a model that has none, or whose configuration does not ask for it with `output_router_logits`."""


def predict(model: nn.Module, ids_BT: Tensor, end: int | None) -> Prediction:
    """The model's prediction after each token of whole blocks.

    Args:
        end: id that ends a document, where attention stops at documents; None where it sees the whole block.
    """
    if end is None:
        output = model(input_ids=ids_BT, use_cache=False)
        return Prediction(output.logits, _router_loss(model, output))
    positions_BT = document_positions(ids_BT, end)
    if not _is_flash(model):
        output = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False)
        return Prediction(output.logits, _router_loss(model, output))
    # Flash attention looks at positions in a batch of one row only, and would take the rows for one document each.
    output = model(input_ids=ids_BT.reshape(1, -1), position_ids=positions_BT.reshape(1, -1), use_cache=False)
    return Prediction(output.logits.view(*ids_BT.shape, -1), _router_loss(model, output))


class WithLoss(nn.Module):
    """A causal language model and the loss of its predictions in one module: what strategies wrap, shard and run.

    Called with blocks, (B, T), and `end` as in `predict`, it returns the loss of every predicted token,
    (B, T - 1) float32, nats, and `Prediction.router_loss`. So a pass has no logits outside of it, and can be compiled
    from ids to losses. Passes of training alone are, all in one shape, because each other would be compiled for itself;
    an evaluation is the same whether training is compiled or not.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._compiled: Callable[[Tensor, int | None], tuple[Tensor, Tensor | None]] | None = None
        self._compiled_shape: tuple[int, ...] = (0, 0)
        self._runs_compiled = False
        self._num_added = 0

    def forward(self, ids_BT: Tensor, end: int | None = None, *, logits: bool = False) -> tuple[Tensor, Tensor | None]:
        """The losses, or with `logits` the logits, (B, T, V); and the router's loss."""
        compiled = self._compiled if self.training and not logits and self._is_compiled_for(ids_BT) else None
        # Also what parts of the model go by, here and where the backward pass computes them again.
        self._runs_compiled = compiled is not None
        # Plain tuples, which the engines of strategies can look into.
        if logits:
            prediction = predict(self.model, ids_BT, end)
            return prediction.logits, prediction.router_loss
        if compiled is None:
            return self._losses(ids_BT, end)
        # Blocks that are missing in a short batch are filled up by its first, whose losses there are left out.
        num_blocks = len(ids_BT)
        filling_BT = ids_BT[:1].expand(self._compiled_shape[0] - num_blocks, -1)
        losses_BT, router_loss = compiled(torch.cat([ids_BT, filling_BT]), end)
        return losses_BT[:num_blocks], router_loss

    @property
    def fills_short_batches(self) -> bool:
        """Whether passes over fewer blocks are compiled as well; the loss of a router depends on all that are there."""
        model: Any = self.model
        return not getattr(model.config.get_text_config(), "output_router_logits", False)

    def compile_whole(self, shape: tuple[int, ...], *, multiple: int = 1) -> None:
        """Compile passes of training over at most B blocks from ids to losses, when the first comes.

        Args:
            shape: (B, T).
            multiple: of how many logits the head computes in such a pass; those beyond the vocabulary have probability
                0. The weights stay as they are.
        """
        self._pad_head(multiple)
        self._compiled, self._compiled_shape = compile_function(self._losses), shape

    def compile_parts(self, shape: tuple[int, ...], parts: Iterable[nn.Module], *, multiple: int = 1) -> None:
        """As `compile_whole`, but some modules of the model, and the loss, each for itself."""
        self._pad_head(multiple)
        for part in parts:
            # The hooks of a strategy, which are called with the module, stay outside.
            part.forward = self._where_compiled(compile_function(part.forward), part.forward)
        self._compiled, self._compiled_shape = partial(self._losses, loss=compile_function(self._loss)), shape

    def compile_for(self, shape: tuple[int, ...]) -> None:
        """Compile passes that are compiled already for another shape, (B, T), when the first comes."""
        self._compiled_shape = shape

    def uncompile(self) -> None:
        """Compute every pass as it was before it was compiled."""
        self._compiled = None

    def _is_compiled_for(self, ids_BT: Tensor) -> bool:
        most_blocks, size = self._compiled_shape
        fits = len(ids_BT) <= most_blocks if self.fills_short_batches else len(ids_BT) == most_blocks
        return fits and ids_BT.shape[1] == size

    def _losses(
        self, ids_BT: Tensor, end: int | None, loss: Callable[..., Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        prediction = predict(self.model, ids_BT, end)
        return (loss or self._loss)(prediction.logits, ids_BT, end), prediction.router_loss

    def _loss(self, logits_BTV: Tensor, ids_BT: Tensor, end: int | None) -> Tensor:
        if self._runs_compiled and self._num_added:
            num_logits = logits_BTV.shape[-1]
            is_added_V = torch.arange(num_logits, device=logits_BTV.device) >= num_logits - self._num_added
            logits_BTV = logits_BTV.masked_fill(is_added_V, torch.finfo(logits_BTV.dtype).min)
        return next_token_loss(logits_BTV, ids_BT, end)

    def _pad_head(self, multiple: int) -> None:
        head = self.model.get_output_embeddings()  # type: ignore[operator]  # of transformers
        if type(head) is not nn.Linear:
            # What it computes is its own affair.
            return
        added = -head.weight.shape[0] % multiple

        def padded(hidden_BTC: Tensor) -> Tensor:
            bias_V = None if head.bias is None else pad(head.bias, (0, added))
            return linear(hidden_BTC, pad(head.weight, (0, 0, 0, added)), bias_V)

        if added:
            self._num_added = added
            head.forward = self._where_compiled(padded, head.forward)  # type: ignore[method-assign]

    def _where_compiled(self, compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (compiled if self._runs_compiled else plain)(*args, **kwargs)


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when it is first called, as one graph, for the shapes that it is called with."""
    # `deterministic`: no choice between kernels by how fast each has just been.
    return torch.compile(function, fullgraph=True, dynamic=False, options={"deterministic": True})


def block_losses(model: nn.Module, ids_BT: Tensor, end: int | None) -> Tensor:
    """The loss of every predicted token, (B, T - 1) float32, nats, of a `WithLoss` or what a strategy made of it."""
    losses_BT: Tensor = model(ids_BT, end)[0]
    return losses_BT


def block_logits(model: nn.Module, ids_BT: Tensor, end: int | None) -> Tensor:
    """The logits, (B, T, V), of a `WithLoss` or what a strategy made of it."""
    logits_BTV: Tensor = model(ids_BT, end, logits=True)[0]
    return logits_BTV


def check_router_loss(model: nn.Module, router_loss: Tensor | None) -> None:
    """Raise ConfigError where a configuration asks for a router loss that its model does not have."""
    text = unwrapped(model).config.get_text_config()
    if router_loss is None and getattr(text, "output_router_logits", False):
        raise ConfigError(
            f"model: its configuration has output_router_logits: true, and {text.model_type} has no loss for its "
            "router; set it to false, there or in model.config",
            field="model",
        )


def _router_loss(model: nn.Module, output: Any) -> Tensor | None:
    aux_loss = getattr(output, "aux_loss", None)
    if not isinstance(aux_loss, Tensor):
        return None
    plain = unwrapped(model)
    # Most models keep it themselves, or in their configuration; JetMoe has a name of its own.
    places = [(holder, name) for name in _COEFFICIENTS for holder in (plain, plain.config.get_text_config())]
    found = [getattr(holder, name) for holder, name in places if hasattr(holder, name)]
    if not found:
        raise ConfigError(
            f"model: {name_of(model)} has a loss for its router and no coefficient that is known; set "
            "output_router_logits to false",
            field="model",
        )
    router_loss: Tensor = aux_loss * found[0]
    return router_loss


def unwrapped(model: nn.Module) -> Any:
    """The transformers model in a `WithLoss`, and in what DDP or DeepSpeed made of that."""
    plain = getattr(model, "module", model)
    return plain.model if isinstance(plain, WithLoss) else plain


def name_of(model: nn.Module) -> str:
    """The name of its class, without what a strategy has made of it."""
    # FSDP2 puts a class of its own over the model's.
    return type(unwrapped(model)).__name__.removeprefix("FSDP")


@contextlib.contextmanager
def first_pass(model: nn.Module) -> Iterator[None]:
    """Turns an error of a model's own code into a ConfigError, because it fails so every time."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        if isinstance(error, (ClmDistError, torch.OutOfMemoryError)) or _PASSING.search(str(error)):
            raise
        raise ConfigError(
            f"model: {name_of(model)} cannot compute a block: {first_line(error)}; its configuration is at fault, or "
            f"it needs more than text, or its attention ({attention_of(unwrapped(model).config)}) does not work here",
            field="model",
        ) from error


def _is_flash(model: nn.Module) -> bool:
    # `flash_attention_2`, `flash_attention_3`, `kernels-community/flash-attn2`, ...
    return "flash" in attention_of(unwrapped(model).config)

"""What a model computes of whole blocks: the logits, and the loss of its router."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clm_dist.errors import ClmDistError, ConfigError, first_line
from clm_dist.train.documents import document_positions

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


def block_logits(model: nn.Module, ids_BT: Tensor, end: int | None) -> Tensor:
    """The logits of `predict`, (B, T, V)."""
    return predict(model, ids_BT, end).logits


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
    """The transformers model in what DDP or DeepSpeed made of it."""
    return getattr(model, "module", model)


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
            "it needs more than text",
            field="model",
        ) from error


def attention_of(model: nn.Module) -> str:
    return str(unwrapped(model).config.get_text_config()._attn_implementation)


def _is_flash(model: nn.Module) -> bool:
    # `flash_attention_2`, `flash_attention_3`, `kernels-community/flash-attn2`, ...
    return "flash" in attention_of(model)

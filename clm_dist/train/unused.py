"""Parameters that no gradient reaches: those of a vision tower, for example, in a model that is given text alone.

The optimizer must not have them: DistributedDataParallel waits for their gradients for ever, ZeRO takes zeros for them,
and weight decay then shrinks what nothing trains. So they are frozen, on every strategy alike. Which they are is seen
before anything is loaded, in a pass over a model of the same configuration whose tensors have shapes and no values.
"""

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from clm_dist.train.model import build_model

logger = logging.getLogger(__name__)

_SHOWN = 3
_SHORT = 8


def find_unused(config: Any, block_size: int) -> dict[str, int]:
    """The trainable parameters that no gradient reaches, and how many values each has.

    A few models look at values on their way, which tensors without values have not; nothing is found then, and the
    pass before the first step finds what this one does not.
    """
    # What a short block uses a longer one uses too; Mamba, for example, takes 10 ms a layer and token.
    unused = _unused_in_pass(config, min(_SHORT, block_size))
    if unused != {} and block_size > _SHORT:
        unused = _unused_in_pass(config, block_size)
    return unused or {}


def _unused_in_pass(config: Any, num_tokens: int) -> dict[str, int] | None:
    """What `find_unused` returns, for a text of so many tokens; None where the pass failed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with torch.device("meta"):
            # Not the caller's: it is changed below.
            model: Any = build_model(copy.deepcopy(config))
            if hasattr(model, "set_experts_implementation"):
                # The one that does not count how many tokens an expert has.
                model.set_experts_implementation("batched_mm")
            model.train()
            with FakeTensorMode(allow_non_fake_inputs=True), _quiet("torch._subclasses.fake_tensor"):
                ids_BT = torch.zeros(1, num_tokens, dtype=torch.int64)
                model(input_ids=ids_BT, use_cache=False).logits.float().mean().backward()
    except Exception:  # whatever a model's own code raises where a tensor has no values
        logger.debug("a pass without values over %s failed", config.model_type, exc_info=True)
        return None
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Inside, a logger says nothing."""
    library = logging.getLogger(name)
    was_disabled, library.disabled = library.disabled, True
    try:
        yield
    finally:
        library.disabled = was_disabled


def describe_unused(unused: Mapping[str, int]) -> str:
    """A sentence that says which parameters are not trained, and why."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in unused))
    more = f" and {len(modules) - _SHOWN} more modules" if len(modules) > _SHOWN else ""
    return (
        f"{sum(unused.values()):,} parameters of the model have no effect on its loss over text, and stay as they are: "
        f"those of {', '.join(modules[:_SHOWN])}{more}"
    )


def trainable_shapes(config: Any, unused: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that are trained, by their names."""
    with torch.device("meta"):
        model = build_model(copy.deepcopy(config))
    freeze(model, unused)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Take parameters out of training."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)  # torch names it only in its documentation

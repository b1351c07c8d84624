"""Bytes that a forward pass keeps for the backward pass, from the sizes of a model.

A count of the tensors that autograd saves, as Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large
Transformer Models", section 4) do it for their model. Those of transformers save more: a norm also keeps what it has
normalised, and `gelu_new` each of its terms. A test holds every family against what autograd saves.
"""

from dataclasses import dataclass

from clm_dist.plan.architecture import Architecture
from clm_dist.train.loss_parts import tokens_at_once

_COMPOSED = ("gelu_new", "gelu_fast", "quick_gelu")
"""Activation functions that transformers writes out in several operations."""


@dataclass(frozen=True)
class Arithmetic:
    """The precision in which a pass computes, and where."""

    is_half: bool
    """Whether matrices are multiplied in bf16 or fp16."""
    is_autocast: bool
    """Whether weights and the residual stream are in fp32, and what is multiplied is cast each time."""
    is_gpu: bool

    @property
    def size(self) -> int:
        """Bytes of an element that is multiplied."""
        return 2 if self.is_half else 4

    @property
    def stream_size(self) -> int:
        """Bytes of an element of the residual stream."""
        return 4 if self.is_autocast else self.size


def layer_bytes(
    model: Architecture, block_size: int, arithmetic: Arithmetic, *, is_eager: bool, is_compiled: bool
) -> float:
    """Bytes that one layer keeps for each token.

    Args:
        is_eager: whether the plain attention is computed, which keeps the scores of all pairs of tokens.
        is_compiled: whether passes are compiled. What lies between matrix products is then computed again.
    """
    size, inputs = arithmetic.size, 1 if model.num_norms == 1 else 2
    if is_compiled:
        mlp = (3 if model.is_gated else 2) * model.intermediate * size
        stream = inputs * model.hidden * (arithmetic.stream_size + size)
        return stream + (2 * model.query_size + 2 * model.kv_size) * size + 4 * model.num_heads + mlp
    kept = _norms(model, arithmetic) + _mlp(model, arithmetic)
    kept += _attention(model, block_size, arithmetic, is_eager=is_eager or model.is_eager)
    if arithmetic.is_autocast and arithmetic.is_half:
        # The input of each product is cast for itself.
        inputs = (1 if model.is_qkv_fused else 3) + (2 if model.is_gated and not model.is_gate_fused else 1)
    kept += inputs * model.hidden * size
    if model.dropout:
        kept += 2 * model.hidden * (1 if arithmetic.is_gpu else size)
    return kept


def loss_bytes(model: Architecture, num_tokens: int, arithmetic: Arithmetic, *, is_compiled: bool) -> float:
    """Bytes of the head and the loss of a pass when they take most: in the backward pass of the loss, or of the head.

    Compiled, these are logits and their gradient. Otherwise the gradient takes the place of the logits. Beside it are
    log-probabilities and two gradients in fp32 of the tokens whose loss is computed at once; later the gradient of the
    head, which autocast casts.
    """
    size, num_logits = arithmetic.size, num_tokens * model.vocabulary
    last = num_tokens * model.hidden * (_norm_size(model, arithmetic, arithmetic.stream_size) + size)
    if is_compiled:
        return last + 2 * size * num_logits
    at_once = min(num_tokens, tokens_at_once(model.vocabulary, on_cpu=not arithmetic.is_gpu))
    of_loss = 12 * at_once * model.vocabulary + (size * num_logits if num_tokens > at_once else 0)
    casts = arithmetic.is_half and arithmetic.is_autocast
    of_head = size * num_logits + (size + (4 if casts else 0)) * model.hidden * model.vocabulary
    if not model.softcaps_logits:
        return last + max(of_loss, of_head)
    # What the tanh of the cap returned is kept; the cap's own backward pass has two gradients beside it.
    return last + size * num_logits + max(of_loss, of_head, 2 * size * num_logits)


def _norm_size(model: Architecture, arithmetic: Arithmetic, size: int) -> int:
    """Bytes that a norm keeps of an element whose input has a size."""
    if model.norm == "layer":
        return size
    if model.norm == "plain":
        return 4
    return 4 + (4 if model.keeps_norms_in_fp32 or size == 4 else 2)


def _norms(model: Architecture, arithmetic: Arithmetic) -> float:
    num_inputs = 1 if model.is_parallel else model.num_norms
    kept = num_inputs * model.hidden * _norm_size(model, arithmetic, arithmetic.stream_size)
    if model.head_norms != "none":
        kept += (model.query_size + model.kv_size) * _norm_size(model, arithmetic, arithmetic.size)
    return kept


def _mlp(model: Architecture, arithmetic: Arithmetic) -> float:
    size = arithmetic.size
    if model.is_gated:
        return 4 * model.intermediate * size
    if model.activation in _COMPOSED:
        # A GPU's autocast computes the power, and so all that follows, in fp32: three of fp32, two of half precision.
        in_fp32 = arithmetic.is_gpu and arithmetic.is_autocast and arithmetic.is_half
        return model.intermediate * (16 if in_fp32 else 5 * size)
    return (1 if model.activation == "relu" else 2) * model.intermediate * size


def _attention(model: Architecture, block_size: int, arithmetic: Arithmetic, *, is_eager: bool) -> float:
    size, query, kv = arithmetic.size, model.query_size, model.kv_size
    pairs = model.num_heads * block_size
    if is_eager:
        # Keys and values are repeated for all heads.
        scores = 4 + (size if arithmetic.is_half else 0) + model.softcaps_scores * size
        if model.attention_dropout:
            scores += (1 if arithmetic.is_gpu else size) + (0 if arithmetic.is_half else size)
        return 4 * query * size + pairs * scores
    if model.attention_dropout and not arithmetic.is_gpu:
        # On a CPU there is no attention with dropout but the plain one, in fp32: weights, mask and product.
        return (3 * query + query) * 4 + 12 * pairs
    kept = (2 * query + 2 * kv) * size + 4 * model.num_heads
    if model.rotary != "none" and model.is_qkv_fused:
        # The values are a view of all three.
        kept += (query + kv) * size
    if model.rotary == "part":
        # Its output is copied into another order.
        kept += query * size
    return kept

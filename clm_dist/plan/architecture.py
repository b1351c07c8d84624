"""The sizes of a decoder: all that its parameters, its arithmetic and its activations depend on.

Parameters are counted as `model.parameters()` does: a tied head once.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Architecture:
    """A decoder of equal layers."""

    family: str
    """`model_type` of the configuration."""
    vocabulary: int
    """Rows of the embedding."""
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate: int
    context: int | None
    """The most tokens that it sees; None where it has no limit."""
    num_positions: int = 0
    """Rows of the learned embedding of positions."""
    is_tied: bool = False
    """Whether the head is the embedding."""
    head_bias: bool = False
    norm: Literal["layer", "rms", "plain"] = "rms"
    """LayerNorm with weight and bias, RMSNorm with a weight, or LayerNorm with neither."""
    num_norms: int = 2
    """Of each layer, over the hidden size."""
    has_last_norm: bool = True
    head_norms: Literal["none", "each", "all"] = "none"
    """Norms of queries and keys: none, one for each head's size that all heads share, or one over all heads."""
    is_qkv_fused: bool = False
    rotary: Literal["none", "part", "whole"] = "whole"
    """How much of a head's size is rotated by the position."""
    is_parallel: bool = False
    """Whether attention and MLP read the same input."""
    keeps_norms_in_fp32: bool = False
    """Whether norms multiply with their weight before they go back to half precision."""
    is_eager: bool = False
    """Whether transformers has no attention but the plain one for it."""
    softcaps_scores: bool = False
    softcaps_logits: bool = False
    is_gated: bool = True
    is_gate_fused: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    dropout: float = 0.0
    """Of the residual stream."""
    attention_dropout: float = 0.0
    num_others: int = 0
    """Parameters that are neither in layers, nor in embeddings, head or last norm."""

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Of all keys, or of all values, of a token."""
        return self.num_kv_heads * self.head_size

    @property
    def layer_matrices(self) -> int:
        """Weights of a layer that are multiplied with activations."""
        attention = self.hidden * (2 * self.query_size + 2 * self.kv_size)
        return attention + (3 if self.is_gated else 2) * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        biases = self.qkv_bias * (self.query_size + 2 * self.kv_size) + self.out_bias * self.hidden
        biases += self.mlp_bias * ((2 if self.is_gated else 1) * self.intermediate + self.hidden)
        of_heads = {"none": 0, "each": 2 * self.head_size, "all": self.query_size + self.kv_size}[self.head_norms]
        norms = self._of_norm(self.hidden) * self.num_norms + self._of_norm(1) * of_heads
        return self.layer_matrices + biases + norms

    @property
    def embedding(self) -> int:
        """Weights of the embedding of tokens."""
        return self.vocabulary * self.hidden

    @property
    def outer_parameters(self) -> int:
        """Parameters outside of the layers."""
        head = self.vocabulary * self.head_bias + (0 if self.is_tied else self.embedding)
        positions = self.num_positions * self.hidden
        last = self._of_norm(self.hidden) * self.has_last_norm
        return self.embedding + positions + head + last + self.num_others

    @property
    def num_parameters(self) -> int:
        return self.num_layers * self.layer_parameters + self.outer_parameters

    @property
    def multiplied(self) -> int:
        """Weights that are multiplied with activations, of which autocast makes copies: the matrices and the head."""
        return self.num_layers * self.layer_matrices + self.embedding

    def with_parameters(self, number: int) -> "Architecture":
        """The same with as many parameters outside of what is known as make a number."""
        return replace(self, num_others=self.num_others + number - self.num_parameters)

    def _of_norm(self, width: int) -> int:
        return {"layer": 2, "rms": 1, "plain": 0}[self.norm] * width

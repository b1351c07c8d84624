"""The architecture of a model from its configuration alone, for the families whose formula is known here.

`families.json` has their defaults under the usual names of transformers, and the names that a family has of its own. A
test holds every family against the model that transformers builds without weights, and every default against
transformers' own.
"""

import functools
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from clm_dist.plan.architecture import Architecture

_OTHER_FORMULA = ("per_layer_config", "add_cross_attention", "quantization_config")
"""Keys with which a model of a known family has other parameters."""
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_MAY_BE_NONE = ("intermediate_size", "max_position_embeddings")


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a configuration, as its `config.json` or `model.config` has it; None for other families.

    Raises:
        ValueError: a size is not a number from 1 on.

    Args:
        config: with `model_type`; what is missing has transformers' default.
    """
    build = _FAMILIES.get(str(config.get("model_type")))
    if build is None or any(config.get(key) for key in _OTHER_FORMULA):
        return None
    return build(_Values(config))


def known_families() -> list[str]:
    """Their `model_type`, sorted."""
    return sorted(_FAMILIES)


@functools.cache
def family_values() -> dict[str, Any]:
    """The content of families.json."""
    values: dict[str, Any] = json.loads(files("clm_dist.plan").joinpath("families.json").read_text(encoding="utf-8"))
    return values


class _Values:
    """A configuration with the defaults of its family, under the usual names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        family = family_values()[config["model_type"]]
        self._names, self._defaults = family["names"], family["defaults"]

    def __getitem__(self, name: str) -> Any:
        for key in (self._names.get(name), name):
            if key in self._config:
                return self._config[key]
        return self._defaults[name]

    def get(self, name: str, default: Any) -> Any:
        """The value of a name that some families do not read."""
        return self[name] if name in self._defaults else default

    def architecture(self, **options: Any) -> Architecture:
        """The architecture with what all families have. Raises ValueError where a size is none."""
        for name in _SIZES:
            value = self[name]
            if not (name in _MAY_BE_NONE and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"{self._names.get(name, name)} is {value!r}, and should be a number from 1 on")
        heads = self["num_attention_heads"]
        kv_heads = self.get("num_key_value_heads", None)
        head_size = self.get("head_dim", self._config.get("head_dim"))
        return Architecture(
            family=self._config["model_type"],
            vocabulary=self["vocab_size"],
            hidden=self["hidden_size"],
            num_layers=self["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads or heads,
            head_size=head_size or self["hidden_size"] // heads,
            intermediate=self["intermediate_size"] or 4 * self["hidden_size"],
            context=self["max_position_embeddings"] or None,
            is_tied=self["tie_word_embeddings"],
            attention_dropout=self["attention_dropout"],
            **options,
        )


def _plain(values: _Values, **options: Any) -> Architecture:
    """An architecture with LayerNorm and an MLP without a gate."""
    return values.architecture(
        is_gated=False,
        activation=values["hidden_act"],
        dropout=values["dropout"],
        **{"norm": "layer", "mlp_bias": True} | options,
    )


def _gpt2(values: _Values) -> Architecture:
    positions = values["max_position_embeddings"]
    return _plain(values, num_positions=positions, rotary="none", is_qkv_fused=True, qkv_bias=True, out_bias=True)


def _gpt_neo(values: _Values) -> Architecture:
    positions = values["max_position_embeddings"]
    return _plain(values, num_positions=positions, rotary="none", is_eager=True, out_bias=True)


def _gpt_neox(values: _Values) -> Architecture:
    bias = values["attention_bias"]
    return _plain(
        values,
        rotary="part",
        is_parallel=values["use_parallel_residual"],
        is_qkv_fused=True,
        qkv_bias=bias,
        out_bias=bias,
    )


def _opt(values: _Values) -> Architecture:
    hidden, bias = values["hidden_size"], values["enable_bias"]
    width = values["word_embed_proj_dim"] or hidden
    # Embedding and head are narrower than the layers in some, with a matrix between.
    narrower = (1 if values["tie_word_embeddings"] else 2) * values["vocab_size"] * (width - hidden)
    return _plain(
        values,
        # The first two rows of the positions are never used.
        num_positions=values["max_position_embeddings"] + 2,
        has_last_norm=values["do_layer_norm_before"] and not values["_remove_final_layer_norm"],
        rotary="none",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        num_others=narrower + (2 * width * hidden if width != hidden else 0),
        **({} if values["layer_norm_elementwise_affine"] else {"norm": "plain"}),
    )


def _phi(values: _Values) -> Architecture:
    return _plain(
        values,
        rotary="part",
        is_parallel=True,
        num_norms=1,
        head_norms="each" if values["qk_layernorm"] else "none",
        head_bias=True,
        qkv_bias=True,
        out_bias=True,
    )


def _phi3(values: _Values) -> Architecture:
    return values.architecture(
        rotary="part", is_qkv_fused=True, is_gate_fused=True, activation=values["hidden_act"], dropout=values["dropout"]
    )


def _gemma2(values: _Values, **options: Any) -> Architecture:
    return _llama(
        values,
        num_norms=4,
        keeps_norms_in_fp32=True,
        softcaps_scores=values["attn_logit_softcapping"] is not None,
        softcaps_logits=values["final_logit_softcapping"] is not None,
        **options,
    )


def _llama(values: _Values, **options: Any) -> Architecture:
    bias = values.get("attention_bias", False)
    has = {"qkv_bias": bias, "out_bias": bias, "mlp_bias": values.get("mlp_bias", False)}
    return values.architecture(activation=values["hidden_act"], **has | options)


_FAMILIES: dict[str, Callable[[_Values], Architecture]] = {
    "gemma": functools.partial(_llama, keeps_norms_in_fp32=True),
    "gemma2": functools.partial(_gemma2, is_eager=True),
    "gemma3_text": functools.partial(_gemma2, head_norms="each"),
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _llama,
    "olmo": functools.partial(_llama, norm="plain"),
    "olmo2": functools.partial(_llama, head_norms="all", keeps_norms_in_fp32=True),
    "opt": _opt,
    "phi": _phi,
    "phi3": _phi3,
    "qwen2": functools.partial(_llama, qkv_bias=True, out_bias=False),
    "qwen3": functools.partial(_llama, head_norms="each"),
    "smollm3": _llama,
}

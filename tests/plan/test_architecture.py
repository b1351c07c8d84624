"""Parameter counts from a configuration alone, against the models that transformers builds."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from clm_dist.plan.families import architecture_of, family_values, known_families
from clm_dist.train.model import build_model

_SMALL = {"vocab_size": 301, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [{"n_inner": 100}, {"tie_word_embeddings": False}, {"n_positions": 77}],
    "gpt_neo": [{"intermediate_size": 100, "attention_types": [[["global"], 3]], "num_layers": 3}],
    "gpt_neox": [{"attention_bias": False}, {"tie_word_embeddings": True}],
    "opt": [
        {"word_embed_proj_dim": 20},
        {"do_layer_norm_before": False},
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False},
        {"word_embed_proj_dim": 20, "tie_word_embeddings": False},
    ],
    "phi": [{"qk_layernorm": True}, {"num_key_value_heads": 2}],
    "phi3": [{"num_key_value_heads": 2}],
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 2}, {"head_dim": 20}],
    "smollm3": [{"attention_bias": True}, {"tie_word_embeddings": False}],
    "mistral": [{"num_key_value_heads": 2}, {"head_dim": 20}],
    "qwen2": [{"num_key_value_heads": 2, "tie_word_embeddings": True}],
    "qwen3": [{"num_key_value_heads": 2, "attention_bias": True}, {"head_dim": 20}],
    "olmo": [{"attention_bias": True}],
    "olmo2": [{"num_key_value_heads": 2}, {"attention_bias": True}],
    "gemma": [{"attention_bias": True}],
    "gemma2": [{"num_key_value_heads": 2, "head_dim": 20}],
    "gemma3_text": [{"num_key_value_heads": 2}, {"attention_bias": True}],
}
_CASES = [
    (family, given)
    for family, variants in _VARIANTS.items()
    for given in ({}, *(_SMALL | {"num_key_value_heads": 4} | one for one in variants))
]


def _config_of(family: str, given: dict[str, Any]) -> Any:
    if "num_key_value_heads" not in family_values()[family]["defaults"]:
        given = {name: value for name, value in given.items() if name != "num_key_value_heads"}
    if family == "gpt_neo" and "num_layers" in given:
        given = {name: value for name, value in given.items() if name != "num_hidden_layers"}
    return AutoConfig.for_model(family, bos_token_id=0, eos_token_id=0, pad_token_id=None, **given)


@pytest.mark.parametrize(("family", "given"), _CASES, ids=str)
def test_parameters_are_those_of_the_model_to_the_last(family: str, given: dict[str, Any]) -> None:
    config = _config_of(family, given)
    with torch.device("meta"):
        model = build_model(config)
    # As a config.json has them, and as a job's model.config has them.
    for values in (config.to_dict(), {"model_type": family} | given):
        architecture = architecture_of(values)
        assert architecture is not None
        assert architecture.num_parameters == sum(p.numel() for p in model.parameters())
        matrices = {name: p.numel() for name, p in model.named_parameters() if ".0." in name and p.dim() == 2}
        assert architecture.layer_matrices == sum(matrices.values())


def test_every_family_is_held_against_its_model() -> None:
    assert sorted(_VARIANTS) == known_families()


@pytest.mark.parametrize("family", known_families())
def test_defaults_are_those_of_transformers(family: str) -> None:
    config, values = AutoConfig.for_model(family), family_values()[family]
    for name, value in values["defaults"].items():
        theirs = getattr(config, values["names"].get(name, name))
        # Some are computed from others where they are not given.
        computed = value is None and name in ("num_key_value_heads", "head_dim", "word_embed_proj_dim")
        assert theirs == value or computed, name


def test_a_family_without_a_formula_has_none() -> None:
    assert architecture_of({"model_type": "mixtral"}) is None
    assert architecture_of({}) is None
    assert architecture_of({"model_type": "gpt2", "add_cross_attention": True}) is None

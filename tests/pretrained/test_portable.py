"""Other programs read a written model as transformers 5 does.

Tried by hand with transformers 4.57.6 and KerasHub 0.32: equal logits for 62 types of docs/models.md, and for GPT-2.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from clm_dist.config.data import TokenizerTraining
from clm_dist.prepare.tokenizer_training import train_tokenizer
from clm_dist.pretrained.portable import make_portable
from clm_dist.train.model import build_model
from tests.support.architectures import ARCHITECTURES

TEXT = "A gradient, and 12 of them: naïve\n\nends"


def written(model_type: str, directory: Path, **values: Any) -> dict[str, Any]:
    """The configuration of a tiny model that was written and made portable; it is the same model as before."""
    config = AutoConfig.for_model(model_type, vocab_size=64, **ARCHITECTURES[model_type] | values)
    torch.manual_seed(0)
    model: Any = build_model(config).eval()
    model.save_pretrained(directory)
    make_portable(directory)
    ids_BT = torch.arange(20)[None]
    again = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert torch.equal(again(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits)
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def test_rotary_embedding_has_its_old_names(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    config = written("llama", tmp_path, rope_parameters=scaled)
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_plain_rotary_embedding_is_not_scaled(tmp_path: Path) -> None:
    config = written("phi", tmp_path, rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5})
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (500.0, 0.5)
    assert "rope_scaling" not in config


def test_rotary_embedding_of_gpt_neox(tmp_path: Path) -> None:
    config = written("gpt_neox", tmp_path, rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5})
    assert (config["rotary_emb_base"], config["rotary_pct"]) == (500.0, 0.5)


def test_rotary_embedding_of_two_bases(tmp_path: Path) -> None:
    bases = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in BASES.items()}
    config = written("gemma3_text", tmp_path, rope_parameters=bases)
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (700.0, 300.0)


BASES = {"full_attention": 700.0, "sliding_attention": 300.0}


def test_text_part_of_a_model_that_sees(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"rope_parameters": {"rope_theta": 500.0}}}))
    make_portable(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["rope_theta"] == 500.0


@pytest.mark.parametrize(
    ("model_type", "old", "new"), [("gpt2", "n_ctx", "n_positions"), ("qwen3_moe", "num_experts", "num_local_experts")]
)
def test_old_names_of_sizes(model_type: str, old: str, new: str, tmp_path: Path) -> None:
    config = written(model_type, tmp_path)
    assert config[old] == config[new]


def test_byte_level_bpe_has_the_files_of_gpt2(tmp_path: Path) -> None:
    train_tokenizer([TEXT * 3], TokenizerTraining(vocab_size=280), tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    make_portable(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] == ids
    bpe = Tokenizer(models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert bpe.encode(TEXT).ids == ids


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_space_before_the_text_is_said_where_transformers_4_looks(tmp_path: Path, *, prefixed: bool) -> None:
    tokenizer = Tokenizer(models.BPE({"Ġ": 0, "a": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed)
    # It says true for itself, and puts no space there.
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    make_portable(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config.get("add_prefix_space", False) is prefixed
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == ([0, 1] if prefixed else [1])


def test_other_tokenizers_have_no_such_files(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    make_portable(tmp_path)
    # As Llama's: its bytes are tokens of their own.
    bytewise = Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True))
    bytewise.decoder = decoders.ByteFallback()
    PreTrainedTokenizerFast(tokenizer_object=bytewise).save_pretrained(tmp_path)
    make_portable(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_more_special_tokens_have_their_old_name(tmp_path: Path) -> None:
    train_tokenizer([TEXT * 3], TokenizerTraining(vocab_size=280), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(tmp_path)
    make_portable(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<|user|>"]
    assert "extra_special_tokens" not in config
    assert "<|user|>" in AutoTokenizer.from_pretrained(tmp_path).all_special_tokens

"""What is wrong with a model is said before workers start."""

import json
import shutil
from pathlib import Path

import pytest

from clm_dist.errors import ConfigError
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import Stores
from clm_dist.prepare.pipeline import prepare
from clm_dist.pretrained.tokenizer import load_tokenizer
from clm_dist.progress import Silent
from clm_dist.train.model import check_ids, check_model, check_tokenizer
from tests.conftest import MakeJob


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.config.n_layer=x",), r"model\.config: .*n_layer"),
        (("model.config.n_layer=0",), r"model\.config: a model without layers learns nothing"),
        (("model.config.n_layer=1000000",), r"model\.config: 1,000,000 layers, more than the 10,000 that are built"),
        (("model.config.n_embd=33",), r"model\.config: no gpt2 can be built: .*num_heads"),
        (("model.config.model_type=gtp2",), r"model\.config: unknown model_type gtp2; did you mean gpt2\?"),
        (("model.config.model_type=null",), r"model\.config: unknown model_type None"),
        (
            ("model.attention=flash_attention_2", "train.precision=bf16"),
            r"model\.attention: flash_attention_2 cannot be used: .*package .*; pip install flash-attn, or leave",
        ),
        (
            ("model.attention=kernels-community/flash-attn2", "train.precision=bf16"),
            r"model\.attention: kernels-community/flash-attn2 cannot be used: .*kernels",
        ),
        (
            ("model.attention=flex_attention",),
            r"model\.attention: flex_attention cannot be used: GPT2LMHeadModel does not",
        ),
        (("model.attention=eager", "model.config.n_embd=33"), r"model\.config: no gpt2 can be built: .*num_heads"),
        (("model.config={model_type: bert}",), r"model\.config: bert is an encoder, which sees the tokens"),
        (("model.config={model_type: t5}",), r"t5 is no causal language model"),
        (
            ("model.config={model_type: openai-gpt}", "train.gradient_checkpointing=true"),
            "gradient_checkpointing is not supported by OpenAIGPTLMHeadModel",
        ),
    ],
)
def test_configurations(make_job: MakeJob, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_model(make_job(*settings))
    assert "\n" not in str(caught.value)


def test_a_context_below_the_block_is_found_inside_a_composite_configuration(make_job: MakeJob) -> None:
    config = "{model_type: gemma3, text_config: {num_hidden_layers: 1, hidden_size: 8, max_position_embeddings: 16}}"
    with pytest.raises(ConfigError, match="above the model's context of 16"):
        check_model(make_job(f"model.config={config}"))


def test_weights_that_are_not_there_or_damaged(make_job: MakeJob, finished_run: RunDir, tmp_path: Path) -> None:
    model = Path(shutil.copytree(finished_run.final, tmp_path / "model"))
    job = make_job("model.config=null", f"model.path={model}", "tokenizer.train=null")
    check_model(job)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model\.path .*model.safetensors is damaged"):
        check_model(job)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"model\.path .*model: it holds no weights"):
        check_model(job)


@pytest.fixture
def model(finished_run: RunDir, tmp_path: Path) -> Path:
    """A copy of a model with 300 rows, beside its tokenizer of 300 ids."""
    return Path(shutil.copytree(finished_run.final, tmp_path / "model"))


def test_a_token_that_was_added_needs_a_row_only_where_a_text_has_it(
    model: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    settings = ("model.config=null", f"model.path={model}", "tokenizer.train=null")
    job = make_job(*settings)
    check_tokenizer(job, tokenizer)
    check_ids(job, tokenizer, prepare(job, Stores(tmp_path / "stores"), Silent()).local)

    spelled = tmp_path / "spelled.jsonl"
    spelled.write_text('{"topic": "t", "text": "a text with [PAD] in it, and more so that it fills a block"}\n' * 40)
    job = make_job(*settings, f"data.path={spelled}")
    store = prepare(job, Stores(tmp_path / "stores"), Silent()).local
    with pytest.raises(ConfigError, match=r"the blocks hold the id 300 \('\[PAD\]'\), and the embedding .* 300 rows"):
        check_ids(job, tokenizer, store)
    check_ids(make_job(*settings, "model.resize=true", f"data.path={spelled}"), tokenizer, store)


def test_a_vocabulary_above_the_embedding_is_refused_before_there_are_blocks(model: Path, make_job: MakeJob) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 600
    (model / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(model)
    assert len(tokenizer) == 300
    settings = ("model.config=null", f"model.path={model}", "tokenizer.train=null")
    with pytest.raises(ConfigError, match=r"the tokenizer has the id 600 .*, and the embedding .* 300 rows"):
        check_tokenizer(make_job(*settings), tokenizer)
    check_tokenizer(make_job(*settings, "model.resize=true"), tokenizer)

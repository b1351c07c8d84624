"""What is wrong with a model is said before workers start."""

import shutil
from pathlib import Path

import pytest

from clm_dist.errors import ConfigError
from clm_dist.files.run_dir import RunDir
from clm_dist.train.model import check_model
from tests.conftest import MakeJob


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.config.n_layer=x",), r"model\.config: .*n_layer"),
        (("model.config.n_layer=0",), r"model\.config: a model without layers learns nothing"),
        (("model.config.n_embd=33",), r"model\.config: no gpt2 can be built: .*num_heads"),
        (("model.config.model_type=gtp2",), r"model\.config: unknown model_type gtp2; did you mean gpt2\?"),
        (("model.config.model_type=null",), r"model\.config: unknown model_type None"),
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

"""Text from a model, in the guide's two ways."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from clm_dist.errors import ConfigError
from clm_dist.files.run_dir import RunDir
from clm_dist.generate import Sampling, find_model, generate
from clm_dist.pretrained.prompts import encode
from tests.support.command import clm_dist


def test_the_same_seed_gives_the_same_text_whatever_prompts_are_beside_it(finished_run: RunDir) -> None:
    model = str(finished_run.final)
    both = list(generate(model, ["The import", "A class"], seed=1, sampling=Sampling(max_new_tokens=20)))
    (alone,) = generate(model, ["A class"], seed=1, sampling=Sampling(max_new_tokens=20))
    (other,) = generate(model, ["A class"], seed=2, sampling=Sampling(max_new_tokens=20))
    assert both[1] == alone != other
    assert both[0].startswith("The import")


def test_generate_is_transformers_with_the_guides_values(finished_run: RunDir) -> None:
    from transformers import AutoModelForCausalLM, set_seed

    tokenizer = AutoTokenizer.from_pretrained(finished_run.final)
    model = AutoModelForCausalLM.from_pretrained(finished_run.final)
    inputs = tokenizer("The import", return_tensors="pt").input_ids
    set_seed(42)
    outputs = model.generate(inputs, max_new_tokens=100, do_sample=True, top_k=50, top_p=0.95)
    (ours,) = generate(str(finished_run.final), ["The import"], seed=42, sampling=Sampling())
    assert ours == tokenizer.batch_decode(outputs, skip_special_tokens=True)[0]


def test_pipeline_is_transformers_pipeline(finished_run: RunDir) -> None:
    from transformers import pipeline, set_seed

    generator = pipeline("text-generation", model=str(finished_run.final))
    set_seed(42)
    theirs = generator("The import", max_new_tokens=100)[0]["generated_text"]
    (ours,) = generate(str(finished_run.final), ["The import"], seed=42, sampling=None)
    assert ours[: len(theirs)] == theirs


def test_a_context_that_is_full(finished_run: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"has \d+ tokens, the model's context 128; shorten the prompt"):
        list(generate(str(finished_run.final), ["word " * 200], seed=0, sampling=Sampling()))
    (text,) = generate(str(finished_run.final), [""], seed=0, sampling=Sampling(max_new_tokens=9999))
    assert text
    # All prompts are checked before the first text.
    with pytest.raises(ConfigError, match=r"the prompt 'word .*\.\.\.' \(2 of 2\) has \d+ tokens"):
        next(generate(str(finished_run.final), ["The", "word " * 200], seed=0, sampling=Sampling()))


def test_an_empty_prompt_says_with_what_it_begins_or_that_nothing_can(run: RunDir) -> None:
    notes: list[str] = []
    next(generate(str(run.final), [""], seed=0, sampling=Sampling(3), note=notes.append))
    assert notes == ["an empty prompt begins with '<|endoftext|>'"]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := run.final / name).exists():
            content = json.loads(file.read_text())
            file.write_text(json.dumps({key: value for key, value in content.items() if not key.endswith("_token")}))
    with pytest.raises(ConfigError, match=r"the prompt '' is empty, and the tokenizer of .* has no token to begin"):
        next(generate(str(run.final), [""], seed=0, sampling=Sampling(3)))


def test_prompts_from_options_a_file_and_standard_input(
    finished_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", finished_run.root, "--max-new-tokens", "3", "--greedy")
    by_option = clm_dist(capsys, monkeypatch, *command, "--prompt", "The", "--prompt", "A class")
    (tmp_path / "prompts").write_text("The\n\nA class\n")
    by_file = clm_dist(capsys, monkeypatch, *command, "--file", tmp_path / "prompts")
    monkeypatch.setattr("sys.stdin", io.StringIO("The\nA class\n"))
    by_input = clm_dist(capsys, monkeypatch, *command)
    assert by_option.code == 0
    assert by_option.out == by_file.out == by_input.out
    assert by_option.out.startswith("The")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "there is no prompt" in clm_dist(capsys, monkeypatch, *command).err
    assert "cannot read the prompts" in clm_dist(capsys, monkeypatch, *command, "--file", tmp_path / "none").err


def test_prompts_that_are_no_text(
    finished_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "latin-1"
    file.write_bytes("Café".encode("latin-1"))
    said = clm_dist(capsys, monkeypatch, "generate", finished_run.root, "--file", file)
    assert (said.code, f"error: the prompts in {file} are not UTF-8 text: " in said.err) == (2, True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="utf-8"))
    said = clm_dist(capsys, monkeypatch, "generate", finished_run.root)
    assert (said.code, "error: the prompts are not UTF-8 text: " in said.err) == (2, True)
    said = clm_dist(capsys, monkeypatch, "generate", finished_run.root, "--prompt", "Caf\udce9")
    assert (said.code, "error: the prompts are not UTF-8 text: " in said.err) == (2, True)


def test_texts_are_written_as_json_lines_as_they_are_done(
    finished_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["The\u2028rule", 'A "class"', "x: Café"]
    given, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    lines = [json.dumps({"id": 7, "prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    given.write_text("\ufeff" + "\n\n".join(lines) + "\r\n", encoding="utf-8")
    command = ("generate", finished_run.root, "--file", given, "--max-new-tokens", "5")
    printed = clm_dist(capsys, monkeypatch, *command, "--out", "-")
    texts = list(generate(str(finished_run.final), prompts, seed=42, sampling=Sampling(5)))
    expected = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    assert [json.loads(line) for line in printed.out.split("\n")[:-1]] == expected

    def stopped(*arguments: Any, **options: Any) -> Iterator[str]:
        yield from texts[:2]
        assert [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]] == expected[:2]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("clm_dist.generate.generate", stopped)
        assert clm_dist(capsys, monkeypatch, *command, "--out", out).code == 130
    said = clm_dist(capsys, monkeypatch, *command, "--out", out)
    assert (said.code, f"--out {out} has texts already" in said.err) == (2, True)
    assert len(out.read_text("utf-8").split("\n")) == 3
    out.write_text("")
    assert clm_dist(capsys, monkeypatch, *command, "--out", out, "--batch-size", 2).code == 0
    assert [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]] == expected


@pytest.mark.parametrize("line", ['{"text": "The"}', '"The"', "The", '{"prompt": 7}', "[1]"])
def test_a_line_that_has_no_prompt_is_named(
    finished_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    (file := tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "The"}}\n{line}\n')
    said = clm_dist(capsys, monkeypatch, "generate", finished_run.root, "--file", file)
    assert (said.code, said.out) == (2, "")
    assert f'error: {file}:2 is not an object with a text "prompt"; write ' in said.err


def test_a_file_that_cannot_be_written_is_named_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "none" / "texts.jsonl"
    said = clm_dist(capsys, monkeypatch, "generate", tmp_path, "--prompt", "The", "--out", out)
    assert (said.code, f"--out {out} cannot be written: No such file" in said.err) == (2, True)


def test_what_the_context_cuts_is_said(
    finished_run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = clm_dist(capsys, monkeypatch, "generate", finished_run.root, "--prompt", "The", "--max-new-tokens", 999)
    assert said.code == 0
    assert re.search(
        r"the prompt leaves less room than 999 new tokens in the model's context of 128: 'The' has (\d) tokens?, and "
        r"goes on for 12\d at most",
        said.err,
    )
    assert "room" not in said.out


def test_options_that_would_be_ignored_or_cannot_be(
    finished_run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", finished_run.root, "--prompt", "The", "--pipeline")
    for option in (
        ("--max-new-tokens", 100),
        ("--top-k", 50),
        ("--top-p", 0.95),
        ("--temperature", 1.0),
        ("--greedy",),
    ):
        # Also with the value that is the default: what a person says counts.
        said = clm_dist(capsys, monkeypatch, *command, *option)
        assert (said.code, said.out) == (2, "")
        assert f"--pipeline has defaults of its own and takes no {option[0]}; " in said.err
    said = clm_dist(capsys, monkeypatch, "generate", finished_run.root, "--prompt", "The", "--batch-size", 8)
    assert (said.code, "--batch-size is only for --out" in said.err) == (2, True)
    for seed in (-1, 2**32):
        said = clm_dist(capsys, monkeypatch, "generate", finished_run.root, "--prompt", "The", "--seed", seed)
        assert (said.code, "'--seed'" in said.err) == (2, True)


@pytest.mark.parametrize("command", [["generate", "--prompt", "The"], ["evaluate"]])
def test_a_model_that_is_damaged(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str], stores: Path
) -> None:
    options = ("--job", run.job, "--store", stores) if command == ["evaluate"] else ()
    weights = run.final / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    said = clm_dist(capsys, monkeypatch, *command, run.final, *options)
    assert said.code == 2
    assert f"error: the model {run.final}: {weights} is damaged (Error while deserializing header" in said.err
    # Weights of another configuration.
    weights.write_bytes(whole)
    config = run.final / "config.json"
    config.write_text(config.read_text().replace('"n_embd": 32', '"n_embd": 64'))
    said = clm_dist(capsys, monkeypatch, *command, run.final, *options)
    assert (said.code, f"the model {run.final}: transformer.h.0.attn.c_attn.bias is 96 in its files" in said.err) == (
        2,
        True,
    )


def test_a_run_is_its_final_model(finished_run: RunDir, tmp_path: Path) -> None:
    assert find_model(str(finished_run.root)) == str(finished_run.final)
    assert find_model(str(tmp_path)) == str(tmp_path)
    assert find_model("distilbert/distilgpt2") == "distilbert/distilgpt2"


def test_a_real_model_tells_its_story(shared: Path) -> None:
    (text,) = generate(
        str(shared / "models" / "stories260K"), ["Once upon a time"], seed=0, sampling=Sampling(30, greedy=True)
    )
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.parametrize("sampling", [Sampling(greedy=True, max_new_tokens=8), None], ids=["own", "pipeline"])
def test_a_prompt_goes_on_where_the_tokenizer_ends_texts(run: RunDir, sampling: Sampling | None) -> None:
    def written() -> str:
        (text,) = generate(str(run.final), ["The rule"], seed=0, sampling=sampling, device="cpu")
        return text

    before = written()
    file = run.final / "tokenizer.json"
    content = json.loads(file.read_text())
    end = {"id": "<|endoftext|>", "type_id": 0}
    ids = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": end}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": ids},
    }
    file.write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    ids = tokenizer("The rule")["input_ids"]
    assert ids[-1] == 0
    assert encode(tokenizer, "The rule") == ids[:-1]
    assert written() == before


def test_an_id_above_the_embedding_names_the_tokenizer(run: RunDir) -> None:
    file = run.final / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= dict.fromkeys(["T"], 600)
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"the prompt 'T' has the id 600, and the embedding of .* has 300 rows"):
        list(generate(str(run.final), ["T"], seed=0, sampling=None, device="cpu"))

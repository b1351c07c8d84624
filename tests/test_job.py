"""Job files: what they give, and what a wrong one says."""

import errno
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from clm_dist.config.differences import differing_fields
from clm_dist.config.job import JobConfig
from clm_dist.config.load import job_text, load_job, read_saved_job
from clm_dist.config.public import data_name, public_fields
from clm_dist.config.schema import job_schema
from clm_dist.errors import ConfigError

GOOD = "name: a\ndata: {source: builtin}\nmodel: {path: gpt2}\n"
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcde", "bcdef", strict=True)
)


def error_of(path: Path, text: str, *overrides: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_job(path, overrides)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "job.yaml"


def test_defaults_are_those_of_the_guide(path: Path) -> None:
    path.write_text(GOOD)
    job = load_job(path).config
    train = job.train
    assert (train.learning_rate, train.weight_decay, train.epochs, train.schedule) == (2e-5, 0.01, 3, "linear")
    assert (job.data.block_size, job.batch.micro_size, job.eval.every, job.train.seed) == (128, 8, "epoch", 42)


def test_a_file_changes_the_file_that_it_extends_and_set_changes_both(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(GOOD + "train: {epochs: 5, weight_decay: 0.1}\n")
    (tmp_path / "sub" / "child.yaml").write_text("extends: ../base.yaml\nname: b\ntrain: {epochs: 7}\n")
    job = load_job(tmp_path / "sub" / "child.yaml", ["train.learning_rate=1e-3", "data.split='train[:10]'"])
    assert (job.config.name, job.config.train.epochs, job.config.train.weight_decay) == ("b", 7, 0.1)
    assert (job.config.train.learning_rate, job.config.data.split) == (1e-3, "train[:10]")
    assert job.where("train.epochs") == f"{tmp_path / 'sub' / 'child.yaml'}:3"
    assert job.where("train.weight_decay") == f"{tmp_path / 'base.yaml'}:4"
    assert job.where("train.learning_rate") == "--set train.learning_rate=1e-3"
    assert job.where("checkpoint.keep") is None


def test_a_model_configuration_replaces_another_whole(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "name: a\ndata: {source: builtin}\ntokenizer: {train: {}}\nmodel: {config: {model_type: gpt2, n_layer: 2}}\n"
    )
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nmodel: {config: {model_type: llama}}\n")
    assert load_job(tmp_path / "child.yaml").config.model.config == {"model_type": "llama"}
    small = load_job(tmp_path / "base.yaml", ["model.config.n_layer=1"]).config.model.config
    assert small == {"model_type": "gpt2", "n_layer": 1}


def test_unknown_key_names_the_nearest_and_its_line(path: Path) -> None:
    assert error_of(path, GOOD + "train:\n  epoch: 3\n") == (f"{path}:5: unknown key train.epoch; did you mean epochs?")
    assert f"{path}:4: unknown key trian; did you mean train?" in error_of(path, GOOD + "trian: {epochs: 3}\n")
    assert "valid keys here: every, micro_size" in error_of(path, GOOD + "eval: {qqq: 3}\n")
    assert error_of(path, GOOD, "train.epoch=3").startswith("--set train.epoch=3: unknown key train.epoch;")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "model: {path: null, resize: true, config: {model_type: gpt2}}",
            "model.resize is for model.path; a model.config",
        ),
        (
            "model: {path: gpt2, attention: flash}",
            "model.attention is 'flash': input should be auto, eager, sdpa, flex",
        ),
        ("train: {epochs: three}", "train.epochs is 'three': input should be a valid integer"),
        ("train: {warmup_ratio: 0.1, warmup_steps: 5}", "train has warmup_steps and warmup_ratio; leave one of them"),
        (
            "train: {schedule: wsd, warmup_ratio: 0.5, decay_ratio: 0.6}",
            "train.warmup_ratio 0.5 and train.decay_ratio 0.6",
        ),
        (
            "train: {compile: sometimes}",
            "train.compile is 'sometimes': input should be 'auto', or input should be a valid",
        ),
        ("train: {epochs: true}", "train.epochs is True: input should not be true or false"),
        ("train: {epochs: 0}", "train.epochs is 0: input should be greater than 0"),
        ("train: {epochs: 1" + 26 * "0" + "}", f"train.epochs is {10**26}: input should be less than or equal to"),
        ("train: {max_steps: 3000000000}", "train.max_steps is 3000000000: input should be less than or equal to 2147"),
        ("train: {learning_rate: .nan}", "train.learning_rate is nan: input should be a finite number"),
        ("train: {seed: -1}", "train.seed is -1: input should be greater than or equal to 0"),
        ("data: {source: builtin, seed: 4294967296}", "data.seed is 4294967296: input should be less than 4294967296"),
        ("model: {config: {model_type: gpt2, initializer_range: .inf}}", "model.config is inf: input should be a fini"),
        ("train: 3", "train is 3: input should be a valid dictionary"),
        ("eval: {every: sometimes}", "eval.every is 'sometimes': input should be 'epoch', or input should be a valid"),
        ("cluster: {strategy: zero4}", "cluster.strategy is 'zero4': input should be 'ddp', 'zero1'"),
        (
            "tracking: [a/b]",
            "tracking is 'a/b': input should be 'tensorboard', 'wandb', 'mlflow', 'trackio', 'comet' or 'prometheus',",
        ),
    ],
)
def test_wrong_value_names_field_value_and_line(path: Path, line: str, message: str) -> None:
    section = line.partition(":")[0]
    others = [known for known in GOOD.splitlines() if not known.startswith(f"{section}:")]
    assert f"{path}:{len(others) + 1}: {message}" in error_of(path, "\n".join([*others, line]))


def test_every_wrong_field_is_named_at_once(path: Path) -> None:
    message = error_of(path, GOOD + "train: {epochs: three, lr: 1}\nbatches: {}\n")
    assert [line.split(": ")[0] for line in message.splitlines()] == [f"{path}:4", f"{path}:4", f"{path}:5"]


def test_a_line_that_is_missing_does_not_flood_the_screen(path: Path) -> None:
    fields = "".join(f"  {name}: 1\n" for name in ("a", "b", "epochs", "seed", *map("field_{}".format, range(10))))
    lines = error_of(path, f"{GOOD}batch:\n{fields}").split("\n")
    assert lines[0].startswith(f"{path}:5: unknown key batch.a")
    assert lines[10:] == [f"{path}: and 4 more; mend the first of them first"]


def test_missing_section_is_named(path: Path) -> None:
    assert error_of(path, "name: a\ndata: {source: builtin}\n") == (f"{path}: model is missing; add it to the job file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "a: [1,\n", "not valid YAML"),
        (GOOD + "data: {source: hub}\n", "found duplicate key data"),
        ("- a\n", "a job file is a mapping"),
        ("42", "a job file is a mapping"),
        (GOOD + f"train: {{epochs: {'9' * 5000}}}\n", "Exceeds the limit"),
        (GOOD + f"train: {{epochs: {'[' * 900}{']' * 900}}}\n", "it is nested too deeply"),
        ("[" * 5000, "it is nested too deeply"),
        (GOOD + "train: {epochs: '${x'}\n", ":4: train.epochs is '${x': input should be a valid integer"),
        (GOOD + "tracking: ['${x.y}']\n", ":4: tracking is '${x.y}': input should be 'tensorboard'"),
        (GOOD + "eval: &a {every: *a}\n", "more than 100,000 values, with those that aliases repeat"),
        (GOOD + BOMB, "more than 100,000 values, with those that aliases repeat"),
        ("root:*:19793:0:99999:7:::\n", "job.yaml: a job file is a mapping of sections"),
        ("password: hunter2\n", "job.yaml: a job file is a mapping of sections"),
        ("\tname: a", ":1: not valid YAML"),
    ],
)
def test_broken_yaml_names_file_and_line(path: Path, text: str, message: str) -> None:
    said = error_of(path, text)
    assert said.startswith(str(path))
    assert message in said


def test_extends_in_a_circle_or_to_nothing(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("extends: b.yaml\n")
    b.write_text("name: b\nextends: a.yaml\n")
    assert f"{b}:2: extends: extends runs in a circle: {a} -> {b} -> {a}" in error_of(a, a.read_text())
    b.write_text("name: b\nextends: missing.yaml\n")
    assert f"{b}:2: extends: there is no job file {tmp_path / 'missing.yaml'}" in error_of(a, a.read_text())
    with pytest.raises(ConfigError, match="there is no job file"):
        load_job(tmp_path / "none.yaml")


def test_a_job_file_that_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"^cannot read the job file {path.parent}: Is a directory$"):
        load_job(path.parent)
    with pytest.raises(ConfigError, match=r"^cannot read the job file x+\.\.\.: File name too long$"):
        load_job(Path("x" * 5000))
    assert f"{path}:1: extends: cannot read the job file {path.parent}: Is a d" in error_of(path, "extends: .\n")
    path.write_text(GOOD)

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=f"^cannot read the job file {path}: Permission denied$"):
        load_job(path)


@pytest.mark.parametrize("field", ["model.path", "tokenizer.path", "data.path", "data.eval_path"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("~nouser/x", "Could not determine home directory"),
        ("x" * 5000, "File name too long"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_a_path_that_cannot_be(path: Path, field: str, value: str, reason: str) -> None:
    section, _, name = field.partition(".")
    job = yaml.safe_load(GOOD)
    job["data"] = {"source": "files", "path": "a"}
    job.setdefault(section, {})[name] = value
    said = error_of(path, yaml.safe_dump(job, sort_keys=False, width=9999))
    assert re.fullmatch(rf"{path}:\d: {field} .* cannot be used as a path: {reason}; name another", said)


def test_a_global_batch_too_small_for_its_workers_names_what_fits(path: Path) -> None:
    text = GOOD + "batch: {global_size: 17}\n"
    assert error_of(path, text, "cluster.workers=4") == (
        f"{path}:4: batch.global_size 17 is 3 x 8 blocks, too few for 4 workers; set batch.global_size to 32, or "
        "batch.micro_size to 4"
    )
    # Both pieces of advice must be right; and what is uneven but enough is no error.
    path.write_text(text)
    for advice in ("batch.global_size=32", "batch.micro_size=4", "cluster.workers=3", "cluster.workers=[1, 3]"):
        load_job(path, ["cluster.workers=4", advice])
    assert "too few for 9 workers; set" in error_of(path, text, "cluster.workers=[2, 9]")
    assert error_of(path, text, "cluster.workers=[3, 2]").endswith("[3, 2] is no range; the smaller number comes first")


def test_what_several_fields_have_a_part_in_is_shown_at_the_first_that_is_set(path: Path) -> None:
    assert error_of(path, GOOD + "cluster: {workers: 100000000}\n").startswith(
        f"{path}:4: batch.global_size 8 is 1 x 8"
    )
    assert error_of(path, GOOD, "cluster.workers=3").startswith("--set cluster.workers=3: batch.global_size 8 is 1 x 8")
    assert error_of(path, GOOD, "model.attention=flash_attention_2").startswith(
        "--set model.attention=flash_attention_2: model.attention flash_attention_2 computes in half precision alone"
    )
    config = GOOD.replace("{path: gpt2}", "{config: {model_type: gpt2}}")
    assert error_of(path, config).startswith(f"{path}:3: tokenizer needs path or train")
    assert error_of(path, GOOD, "model.config.n_layer=3").startswith("--set model.config.n_layer=3: model needs either")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tokenizer: {path: gpt2, train: {}}", "tokenizer has both path and train"),
        ("cluster: {offload: optimizer}", "offload optimizer is not supported with ddp; it works with zero1, zero2"),
        ("train: {precision: fp16}\ncluster: {strategy: fsdp2}", "fp16 is not supported with fsdp2; use bf16"),
    ],
)
def test_settings_that_contradict_each_other(path: Path, line: str, message: str) -> None:
    assert message in error_of(path, GOOD + line + "\n")


def test_set_that_does_not_parse(path: Path) -> None:
    assert "write it as section.field=value" in error_of(path, GOOD, "train.epochs")
    for field in ("tracking[0]", "train..epochs", ".a", "a b", ""):
        assert error_of(path, GOOD, f"{field}=1").startswith(f"--set {field}=1: write it as section.field=value")
    assert error_of(path, GOOD, "train.epochs=[1").startswith("--set train.epochs=[1: ")
    assert "Exceeds the limit" in error_of(path, GOOD, "train.epochs=" + "9" * 5000)
    assert "nested too deeply" in error_of(path, GOOD, "train.epochs=" + "[" * 900 + "]" * 900)


def test_set_that_is_wrong_is_named_and_not_the_file(path: Path) -> None:
    text = GOOD + "train: {epochs: 3}\ntracking: [tensorboard]\n"
    assert error_of(path, text, "train.epochs.x=1") == (
        "--set train.epochs.x=1: train.epochs is {'x': 1}: input should be a valid integer"
    )
    assert error_of(path, text, "train.epochs=${x.y}").startswith(
        "--set train.epochs=${x.y}: train.epochs is '${x.y}': input should be a valid integer"
    )
    assert error_of(path, text, "tracking.0=a/b").startswith("--set tracking.0=a/b: ")


def test_saved_job_reads_back_as_the_same_job(path: Path) -> None:
    path.write_text(GOOD + "train: {learning_rate: 2e-5, epochs: 1}\n")
    job = load_job(path).config
    saved = path.with_name("saved.yaml")
    saved.write_text(job_text(job))
    assert load_job(saved).config == job


def awkward_texts() -> Iterator[str]:
    """Texts that YAML could take for something else, and random ones of its own characters."""
    yield from (
        "1e5",
        "831e104",
        "1_0",
        "0x1f",
        "017",
        "1:30:00",
        "2020-01-01",
        ".5",
        "-.inf",
        "12.",
        "yes",
        "null",
        "~",
    )
    yield from (
        "",
        " ",
        "a: b",
        "- a",
        "# a",
        "${oc.env:HOME}",
        r"\${x}",
        "${x",
        "!!int 3",
        "*a",
        "&a",
        "<<",
        "%a",
        "\ufeffa",
    )
    yield from (
        "~",
        "%a",
        "\ufeffa",
        "a\x85b",
        "a\u2028b",
        "\x85",
        "\ta\t",
        "a\n\nb ",
        "\r\n",
        "é😀",
        "\x7f\x07",
        "'\"\\",
        "a" * 200 + " b",
    )
    drawn = random.Random(0)
    letters = "0123456789eE+-._:~ #&*!|>%@`{}[],?\"'\\\t\n\r\x85\u2028\ufeff$abénotyx"
    for _ in range(3000):
        yield "".join(drawn.choices(letters, k=drawn.randint(1, 8)))


def with_config(job: JobConfig, config: dict[str, Any]) -> JobConfig:
    tokenizer = job.tokenizer.model_copy(update={"path": "gpt2"})
    model = job.model.model_copy(update={"path": None, "config": config})
    return job.model_copy(update={"model": model, "tokenizer": tokenizer})


def test_every_text_and_number_is_saved_as_it_is(path: Path) -> None:
    path.write_text(GOOD)
    job = load_job(path).config
    texts = list(awkward_texts())
    for start in range(0, len(texts), 100):
        some = texts[start : start + 100]
        values = {"model_type": "gpt2", "texts": some, "keys": dict.fromkeys(some, 1)}
        path.write_text(job_text(with_config(job, values)))
        assert read_saved_job(path).model.config == values
    for text in texts[:50]:
        data = job.data.model_copy(update={"join": text, "config": text})
        path.write_text(job_text(job.model_copy(update={"data": data})))
        assert read_saved_job(path).data == data
    numbers: list[Any] = [0.1, 1e-5, 1e22, 5e-324, -0.0, 1.7e308, 2**31, -(2**62), True, None, [], {}]
    path.write_text(job_text(with_config(job, {"model_type": "gpt2", "numbers": numbers})))
    assert repr(read_saved_job(path).model.config["numbers"]) == repr(numbers)  # type: ignore[index]


def test_a_job_file_reads_no_variable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    written = "'${oc.env:HF_TOKEN}'"
    path.write_text(GOOD + f"hub: {{repo: {written}}}\n")
    job = load_job(path, ["data.config=${oc.env:HF_TOKEN}", "tokenizer.path=${hub.repo}"]).config
    assert (job.hub.repo, job.data.config, job.tokenizer.path) == (
        "${oc.env:HF_TOKEN}",
        "${oc.env:HF_TOKEN}",
        "${hub.repo}",
    )
    assert "hf_secret" not in job_text(job)
    assert "hf_secret" not in error_of(path, GOOD + f"train: {{epochs: {written}}}\n")


def test_a_job_file_is_a_regular_file_of_some_size(path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/zero", "pipe"):
        assert "is not a regular file; name a job file" in error_of(path, f"extends: {name}\n")
    (tmp_path / "large.yaml").write_text("# " + "a" * (1 << 20))
    assert f"{path}:1: extends: {tmp_path}/large.yaml has 1,048,578 bytes" in error_of(path, "extends: large.yaml\n")


def test_local_directories_become_absolute_and_hub_ids_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(
        "name: a\ndata: {source: files, path: '*.txt', eval_path: [b, 's3://c/d']}\nmodel: {path: model}\n"
    )
    job = load_job(Path("job.yaml")).config
    assert (job.model.path, job.data.path) == (str(tmp_path / "model"), str(tmp_path / "*.txt"))
    assert job.data.eval_path == [str(tmp_path / "b"), "s3://c/d"]
    assert load_job(Path("job.yaml"), ["model.path=distilbert/distilgpt2"]).config.model.path == (
        "distilbert/distilgpt2"
    )


def test_only_what_changes_the_computation_makes_jobs_differ(path: Path) -> None:
    path.write_text(GOOD)
    job = load_job(path).config
    assert differing_fields(job, load_job(path, ["checkpoint.keep=5", "hub.push=end"]).config) == []
    assert differing_fields(job, load_job(path, ["tokenizer.engine=tokenizers"]).config) == []
    assert differing_fields(job, load_job(path, ["train.epochs=9", "data.seed=1"]).config) == [
        "data.seed",
        "train.epochs",
    ]


def test_schema_describes_every_field_and_takes_the_jobs(tmp_path: Path) -> None:
    schema = job_schema()
    undescribed = [
        f"{section}.{name}"
        for section, model in schema["$defs"].items()
        for name, field in model.get("properties", {}).items()
        if "description" not in field
    ]
    assert undescribed == []
    for file in (Path(__file__).parent.parent / "jobs").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(file.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "a", "train": {"epoch": 3}}, schema)


def test_reading_a_job_loads_neither_torch_nor_ray(path: Path) -> None:
    path.write_text(GOOD)
    code = (
        "import sys, json; from pathlib import Path; from clm_dist.config.load import load_job; "
        f"load_job(Path({str(path)!r})); print(json.dumps([m for m in ('torch', 'ray') if m in sys.modules]))"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(printed) == []


def test_strangers_read_no_directory_and_no_signature_of_a_url(path: Path) -> None:
    path.write_text("name: a\ndata: {source: files, path: []}\nmodel: {path: gpt2}\n")
    paths = "[/private/a.jsonl, 'https://host/b.jsonl?X-Amz-Signature=5ecret']"
    job = load_job(path, [f"data.path={paths}", "cluster.slurm.account=hidden"]).config
    fields = {name: value for name, value, _ in public_fields(job)}
    assert (fields["data.path"], fields["model.path"]) == (["a.jsonl", "b.jsonl"], "gpt2")
    assert data_name(job) == "a.jsonl, b.jsonl"
    assert not any("private" in str(value) or value == "hidden" for value in fields.values())

"""A configuration: YAML, the words that go before it, defaults, and what a wrong one is told."""

from __future__ import annotations

import pytest
import torch
from command_line_jobs import ROOT

from fused_prefopt import available_losses
from fused_prefopt.cli.config import parsed_overrides, read_config
from fused_prefopt.cli.console import UserError
from fused_prefopt.losses import published_settings

pytest.importorskip("transformers")


@pytest.fixture
def config(tmp_path):
    """Writes a configuration that is not used beyond its reading, and reads it."""

    def read(text: str = "", *words: str):
        path = tmp_path / "job.yaml"
        path.write_text(f"model: somewhere\nuse_cpu: true\n{text}")
        return read_config(str(path), words)

    return read


def test_words_in_three_forms_are_read_as_yaml():
    words = "--max-steps 9 loss=dpo --limit=5 loss_kwargs.beta=1e-2 split='' --bf16 --seed -1"
    assert parsed_overrides(words.split()) == [
        ("max_steps", 9),
        ("loss", "dpo"),
        ("limit", 5),
        ("loss_kwargs.beta", 0.01),
        ("split", ""),
        ("bf16", True),
        ("seed", -1),
    ]
    assert parsed_overrides(["a=[x, 2]", "--b", "c=1"]) == [("a", ["x", 2]), ("b", True), ("c", 1)]


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("on", "on"), ("true", True), ("1e-6", 1e-6), ("1E5", 1e5), (".5", 0.5)]
    + [("5", 5), ("-3.", -3.0), ("1e", "1e"), ("~", None), ("-.inf", float("-inf"))]
    + [
        ("[no, {a: off}]", ["no", {"a": "off"}]),
        ("'no'", "no"),
        ("${a}", "${a}"),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(text, value):
    ((_, read),) = parsed_overrides([f"key={text}"])
    assert read == value and type(read) is type(value)


def test_keys_reach_the_settings_and_the_training_arguments(config):
    read = config(
        "loss: gamma-simpo\nloss_kwargs: {beta: 1e-2, gamma: 1}\nsave_strategy: no\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nlearning_rate: 3e-4\nmax_steps: 7\npictures: false\n"
    )
    assert read.settings.loss == "gamma-simpo"
    assert read.settings.loss_kwargs == {"beta": 0.01, "gamma": 1}
    assert read.settings.pictures is False and read.settings.model == "somewhere"
    assert read.training.save_strategy == "no" and read.training.max_steps == 7
    assert read.training.learning_rate == 3e-4
    assert read.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert read.given["loss_kwargs"] == {"beta": 0.01, "gamma": 1}


def test_words_go_before_the_file_and_reach_into_mappings(config):
    text = "max_steps: 7\nloss_kwargs: {beta: 1.0, gamma: 1.0}\n"
    read = config(text, "max_steps=9", "loss_kwargs.gamma=0.5", "peft.r=8")
    assert read.training.max_steps == 9
    assert read.settings.loss_kwargs == {"beta": 1.0, "gamma": 0.5}
    assert read.settings.peft == {"r": 8} == read.given["peft"]
    assert config(text, "loss_kwargs={beta: 2}").settings.loss_kwargs == {"beta": 2}
    assert config(text, "loss_kwargs=null", "loss_kwargs.tau=1").settings.loss_kwargs == {"tau": 1}


def test_defaults_are_a_trainers_but_for_a_few(config):
    from transformers import TrainingArguments

    read, plain = config(), TrainingArguments(output_dir="x", use_cpu=True)
    assert str(read.folder) == "runs/job" and str(read.cache_dir) == "runs/job/cache"
    assert read.training.logging_steps == 10 and read.training.report_to == []
    assert read.training.label_names == ["completion_mask"]
    assert read.training.remove_unused_columns is False
    assert read.training.learning_rate == plain.learning_rate
    assert read.training.per_device_train_batch_size == plain.per_device_train_batch_size
    assert read.settings.prompt_length == 512
    assert config("max_prompt_length: 100\n").settings.prompt_length == 100


def test_a_published_setting_brings_its_learning_rate(config):
    name = "gamma-simpo/mistral-7b-instruct"
    rate = published_settings()[name].learning_rate
    assert config(f"loss: {name}\n").training.learning_rate == rate
    assert config("", "loss=Gamma_SimPO/mistral-7b-instruct").training.learning_rate == rate
    assert config(f"loss: {name}\nlearning_rate: 1e-3\n").training.learning_rate == 1e-3
    assert config(f"loss: {name} + 0.1 sft\n").training.learning_rate == rate


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("max_step: 3\n", [], "job.yaml: unknown key 'max_step' (did you mean 'max_steps'"),
        ("", ["held-uot=test"], "command line: unknown key 'held_uot' (did you mean 'held_out'"),
        ("max_steps: many\n", [], "max_steps: invalid int value: 'many'"),
        ("max_steps: 4.5\n", [], "max_steps: invalid int value: '4.5'"),
        ("pictures: perhaps\n", [], "pictures: Truthy value expected: got perhaps"),
        ("lr_scheduler_type: cosin\n", [], "cosin is not a valid SchedulerType"),
        ("layout: flat\n", [], "layout: got 'flat', wanted one of 'padded', 'packed'"),
        ("engine: cuda\n", [], "engine: got 'cuda'"),
        ("limit: 0\n", [], "limit: got 0, wanted an integer >= 1"),
        ("peft: true\n", [], "peft: got True, needs keys with values"),
        ("loss_kwargs: 3\n", [], "loss_kwargs: invalid dict value: '3'"),
        ("model_config: {model_type: llama}\n", [], "model: got both model and model_config"),
        ("", ["model=null"], "model: got neither model and model_config"),
        ("reference: adapter\n", [], "reference: got adapter without peft"),
        ("label_names: [labels]\n", [], "label_names: got ['labels'], needs to be left out"),
        ("", ["stray"], "stray: got a word alone, needs key=value"),
        ("", ["loss={a"], "loss: got no YAML"),
        ("workspace_mb: 0\n", [], "workspace_mb: got 0.0, wanted a number of MiB > 0"),
        ("workspace_mb: -1\n", [], "workspace_mb: got -1.0, wanted a number of MiB > 0"),
        ("workspace_mb: .nan\n", [], "workspace_mb: got nan, wanted a number of MiB > 0"),
        ("flip_rate: 2\n", [], "flip_rate: got 2.0, wanted a finite number >= 0 and <= 1"),
        ("", ["loss="], "loss: got None, needs a name"),
        ("", ["loss=''"], "loss: got '', needs a name"),
        ("loss: []\n", [], "loss: got [], needs a name or a list"),
        ("", ["dataset=''"], "dataset: got '', needs a name"),
        ("", ["tokenizer=' '"], "tokenizer: got ' ', needs a name"),
        ("loss_kwargs: {1: 7}\n", [], "loss_kwargs: got the key 1, needs names as keys"),
        ("on_nonfinite: halt\n", [], "on_nonfinite: got 'halt', wanted one of 'stop', 'skip'"),
        ("learning_rate: .nan\n", [], "learning_rate: got nan, wanted a finite number >= 0"),
        ("learning_rate: -1\n", [], "learning_rate: got -1.0, wanted a finite number >= 0"),
        ("max_steps: 0\n", [], "max_steps: got 0, wanted an integer >= 1; leave it out to train"),
        ("max_steps: -5\nnum_train_epochs: 0\n", [], "max_steps: got -5, wanted an integer >= 1"),
        ("num_train_epochs: 0\n", [], "num_train_epochs: got 0.0, wanted a finite number > 0"),
        ("num_train_epochs: .nan\n", [], "num_train_epochs: got nan, wanted a finite number > 0"),
        ("gradient_accumulation_steps: 0\n", [], "gradient_accumulation_steps: got 0, wanted an"),
        ("save_strategy: steps\nsave_steps: 0\n", [], "save_steps: got 0.0, wanted a finite"),
        ("dataloader_num_workers: -1\n", [], "dataloader_num_workers: got -1, wanted an integer"),
        ("adam_beta2: 1\n", [], "adam_beta2: got 1.0, wanted a finite number >= 0 and < 1"),
        ("report_to: wandbb\n", [], "report_to: got 'wandbb' (did you mean 'wandb'"),
        ("warmup_steps: -5\n", [], "warmup_steps: got -5: "),
        ("optim: adamw\n", [], "optim: got 'adamw': adamw is not a valid OptimizerNames"),
        ("resume_from_checkpoint: a\n", [], "resume_from_checkpoint: got one, needs --resume"),
        ("limit: 1\nloss: dpo\nlimit: 2\n", [], "got the key 'limit' twice, in lines 3 and 5"),
        ("peft: {r: 2, r: 3}\n", [], "got the key 'r' twice, in lines 3 and 3, needs it once"),
        ("peft:\n\tr: 2\n", [], "got no YAML in line 4, column 1: found character '\\t'"),
        ("peft:\n\tr: 2\n", [], "; indent with spaces"),
        ("- 1\n", [], "got no YAML"),
    ],
)
def test_a_wrong_configuration_is_told_what_it_needs(config, text, words, message):
    with pytest.raises(UserError) as raised:
        config(text, *words)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_batch_of_no_row_is_told_so(config, name):
    key = f"per_device_{name}_batch_size"
    with pytest.raises(UserError, match=f"job.yaml: {key}: got 0, wanted an integer >= 1"):
        config(f"{key}: 0\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_bf16_without_a_gpu_is_blamed_by_its_key(config):
    with pytest.raises(UserError, match="job.yaml: bf16: got True: .*use_cpu"):
        config("bf16: true\n", "use_cpu=false")


def test_a_tracker_that_is_not_installed_is_named(config, monkeypatch):
    import transformers.integrations

    found = "get_available_reporting_integrations"
    monkeypatch.setattr(transformers.integrations, found, lambda: ["tensorboard"])
    with pytest.raises(UserError, match="report_to: got 'wandb', which is not installed: pip inst"):
        config("report_to: wandb\n")
    assert config("report_to: tensorboard\n").training.report_to == ["tensorboard"]


def test_words_that_other_yaml_takes_for_booleans_are_words_wherever_they_stand(config):
    text = "save_strategy: &word no  # is no false\neval_strategy: *word\n"
    read = config(
        f"{text}lr_scheduler_kwargs: {{a: NO}}\nloss_kwargs: {{no: on, b: [yes, true, 'off']}}\n"
    )
    assert read.given["save_strategy"] == read.given["eval_strategy"] == "no"
    assert read.given["lr_scheduler_kwargs"] == {"a": "NO"}
    assert read.given["loss_kwargs"] == {"no": "on", "b": ["yes", True, "off"]}


def test_keys_that_are_merged_in_may_be_given_again(config):
    text = "peft: &base {r: 2, lora_alpha: 4}\nloss_kwargs: &more\n  <<: *base\n  r: 3\n"
    read = config(f"{text}model_config:\n  <<: *more\n  r: 5\n", "model=null")
    assert read.settings.loss_kwargs == {"r": 3, "lora_alpha": 4}
    assert read.settings.model_config == {"r": 5, "lora_alpha": 4}


def test_a_file_that_is_not_there_or_no_mapping(tmp_path):
    with pytest.raises(UserError, match="none.yaml: .*No such file"):
        read_config(str(tmp_path / "none.yaml"), [])
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(UserError, match="list.yaml: got list, needs keys with values"):
        read_config(str(tmp_path / "list.yaml"), [])


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_read(path, tmp_path):
    config = read_config(str(path), ["use_cpu=true", f"output_dir={tmp_path}"])
    assert config.settings.loss in (*available_losses(), *published_settings())

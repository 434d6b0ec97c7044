"""TRL's own trainers beside ours on the same data: curves, references, evaluations, options."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from tiny_models import VOCAB, tiny_llama
from trainers import (
    DATA,
    OF_TRL,
    assert_same_logs,
    beside,
    build,
    config,
    held_out,
    history,
    in_order,
    trl_classes,
)
from transformers import MixtralConfig, MixtralForCausalLM

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

STEPS = 12
LOGGED = {
    "dpo": {"logits/chosen", "entropy", "mean_token_accuracy", "num_tokens", "eval_loss"}
    | {"eval_rewards/accuracies", "eval_logps/rejected", "grad_norm"},
    "kto": {"logits/chosen", "entropy", "num_tokens", "rewards/margins", "kl", "eval_loss"}
    | {"eval_kl", "eval_logps/rejected", "grad_norm"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dpo", {}),
        ("dpo", {"precompute_ref_log_probs": True}),
        ("dpo", {"ld_alpha": 0.3}),
        ("dpo", {"precompute_ref_log_probs": True, "ld_alpha": 0.3}),
        ("dpo", {"loss": "wpo", "use_weighting": True}),
        ("kto", {}),
        ("kto", {"precompute_ref_log_probs": True, "beta": 0.3}),
        ("kto", {"gradient_accumulation_steps": 2, "desirable_weight": 1.4}),
        (
            "kto",
            {"loss": "apo-zero-unpaired", "loss_type": "apo_zero_unpaired"}
            | {"undesirable_weight": 0.7},
        ),
    ],
    ids=str,
)
def test_the_curves_are_trls(tmp_path, kind, changes):
    """With `precompute` there is no second model: the untrained policy is its own reference."""
    given = {"eval_dataset": held_out(kind)}
    theirs, ours = beside(kind, tmp_path, given=given, max_steps=STEPS, **changes)
    for run in (theirs, ours):
        run.evaluate()
    assert LOGGED[kind] < assert_same_logs(theirs, ours)
    losses = history(ours, "loss")
    assert len(losses) == STEPS
    if kind == "kto":
        assert ours.args.loss_type == "kto"
        # Batches of one kind alone have no margin, in TRL and here.
        assert 0 < len(history(ours, "rewards/margins")) < STEPS
    epoch = 4 // changes.get("gradient_accumulation_steps", 1)
    assert sum(losses[-epoch:]) < sum(losses[:epoch])


def adapter(**options):
    targets = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**targets | options)


def experts(seed):
    torch.manual_seed(seed)
    sizes = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return MixtralForCausalLM(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_TRL)
def test_a_peft_model_is_its_own_reference(tmp_path, kind):
    given = {"peft_config": adapter()}
    theirs, ours = beside(kind, tmp_path, given=given, max_steps=6, learning_rate=1e-2)
    assert {"loss", "logps/rejected", "grad_norm"} < assert_same_logs(theirs, ours, tolerance=1e-5)


@pytest.mark.slow
def test_the_router_loss_of_a_mixture_of_experts(tmp_path):
    def make():
        return {"model": experts(0), "reference": experts(5)}

    runs = beside("dpo", tmp_path, make, max_steps=4, router_aux_loss_coef=0.5)
    assert {"loss", "aux_loss", "grad_norm"} < assert_same_logs(*runs, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_TRL)
def test_an_adapter_on_the_head_trains(tmp_path, kind):
    """TRL's own trainers refuse it; transformers' is compared with."""
    given = {"peft_config": adapter(target_modules=["q_proj", "lm_head"])}
    options = {"max_steps": 4, "learning_rate": 1e-2}
    theirs = in_order(build(kind, tmp_path, given=given, **options))
    start = {name: value.detach().clone() for name, value in theirs.model.named_parameters()}
    theirs.train()
    trained = dict(theirs.model.named_parameters())
    assert any("lm_head.lora_B" in name and value.any() for name, value in trained.items())
    if kind == "kto":
        return
    model = peft.get_peft_model(tiny_llama(), given["peft_config"])
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(start[name])
    data = list(theirs.train_dataset)
    ours = build("transformers", tmp_path, data, model=model, reference="adapter", **options)
    in_order(ours).train()
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert history(theirs, name) == pytest.approx(history(ours, name), rel=1e-4), name


@pytest.mark.slow
def test_precomputed_references_are_those_of_the_options(tmp_path):
    options = {"precompute_ref_log_probs": True}
    first = build("trl-dpo", tmp_path, **options)
    names = ["ref_chosen_logps", "ref_rejected_logps"]
    # One data set for all: TRL finds by its fingerprint what it has computed.
    data = first.train_dataset.remove_columns(names)
    first._precompute_ref_logps(data, "train", 4)
    for alpha in (None, 0.0, 0.5):
        run = build("dpo", tmp_path, ld_alpha=alpha, **options)
        rows = run._precompute_ref_logps(data, "train", 4).select(range(4))
        batch = run.data_collator(list(rows))
        wanted = run.compute_ref_log_probs(run.model, batch)
        for name, values in zip(names, wanted, strict=True):
            torch.testing.assert_close(batch[name], values)
    # What is cut off belongs to no log-prob.
    for length, mode in ((7, "keep_start"), (7, "keep_end"), (6, "keep_end")):
        cut = build("dpo", tmp_path, max_length=length, truncation_mode=mode, **options)
        rows = cut._precompute_ref_logps(data, "train", 4).select(range(4))
        batch = cut.data_collator(list(rows))
        wanted = cut.compute_ref_log_probs(cut.model, batch)
        for name, values in zip(names, wanted, strict=True):
            torch.testing.assert_close(batch[name], values)


@pytest.mark.parametrize("given", ["an object", "a name", "a name by place"])
@pytest.mark.parametrize("kind", OF_TRL)
def test_the_default_configuration_is_named_after_the_model(tmp_path, monkeypatch, kind, given):
    make, settings = trl_classes(kind)

    @dataclass
    class OnCpu(settings):
        """TRL's own default asks for a GPU."""

        use_cpu: bool = True
        bf16: bool = False

    monkeypatch.setattr(make, "config_type", OnCpu)
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    model.save_pretrained("some/tiny")
    if given == "an object":
        model.config._name_or_path = "some/tiny"
    model = model if given == "an object" else "some/tiny"
    more = {"train_dataset": DATA[kind](), "processing_class": tiny_tokenizer()}
    places = (model, None, None) if given == "a name by place" else (model,)
    run = make(*places, **more)
    assert run.args.output_dir == f"tiny-{kind.upper()}"
    default = OnCpu(f"tiny-{kind.upper()}")
    assert type(run.args) is OnCpu
    for name in ("loss", "loss_kwargs", "beta", "on_nonfinite", "learning_rate", "max_length"):
        assert getattr(run.args, name) == getattr(default, name), name
    assert run.attachment.loss_fn.name == kind
    assert run.train_dataset.num_rows == 16


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("dpo", {"loss": "dro"}, ValueError, "'dro' is point-wise"),
        ("dpo", {"loss": "simpoo"}, ValueError, "did you mean 'simpo'"),
        (
            "dpo",
            {"loss": "simpo", "loss_kwargs": {"betta": 1}},
            TypeError,
            "no hyperparameter 'betta'",
        ),
        (
            "dpo",
            {"beta": 0.3, "loss_kwargs": {"beta": 2.0}},
            ValueError,
            "beta: got 0.3 and beta=2.0 in loss_kwargs",
        ),
        (
            "kto",
            {"loss": "dro", "desirable_weight": 2.0},
            TypeError,
            "dro has no hyperparameter 'desirable_weight'",
        ),
    ],
    ids=str,
)
def test_configurations_that_name_no_loss(tmp_path, kind, options, error, message):
    with pytest.raises(error, match=message):
        config(kind, tmp_path, **options).build_loss()


def test_hyperparameters_are_given_once(tmp_path):
    for options, beta in (({"beta": 0.3}, 0.3), ({"loss": "simpo"}, 2.5)):
        loss_fn = config("dpo", tmp_path, **options).build_loss()
        assert loss_fn.hyperparameters["beta"] == beta


@pytest.mark.parametrize(
    ("kind", "yaml", "first", "words", "second"),
    [
        (
            "dpo",
            "loss: gamma-simpo\nloss_kwargs:\n  beta: 10.0\n  gamma: 4.0\n",
            ("gamma-simpo", {"beta": 10.0, "gamma": 4.0}),
            ["--loss", "simpo", "--loss_kwargs", '{"beta": 3.0}'],
            ("simpo", {"beta": 3.0}),
        ),
        (
            "kto",
            "loss: dro\nloss_kwargs:\n  log_z0: 3.0\nbeta: 0.7\n",
            ("dro", {"beta": 0.7, "log_z0": 3.0}),
            ["--loss_kwargs", '{"log_z0": 5.0}', "--beta", "0.2"],
            ("dro", {"beta": 0.2, "log_z0": 5.0}),
        ),
    ],
)
def test_the_configuration_is_read_from_yaml_and_the_command_line(
    tmp_path, kind, yaml, first, words, second
):
    from trl import TrlParser

    path = tmp_path / "config.yaml"
    given = "use_cpu: true\nbf16: false\nreport_to: none\n"
    path.write_text(f"output_dir: {tmp_path}\n{yaml}{given}")
    for more, (name, wanted) in (([], first), (words, second)):
        parser = TrlParser(trl_classes(kind)[1])
        (found,) = parser.parse_args_and_config(["--config", str(path), *more])
        loss_fn = found.build_loss()
        assert loss_fn.name == name
        assert wanted.items() <= loss_fn.hyperparameters.items()


def test_a_copy_of_a_model_that_trl_has_patched_twice(tmp_path):
    model, reference = tiny_llama(), tiny_llama(5)
    for _ in range(2):
        run = build("dpo", tmp_path, model=model, reference=reference)
        batch = next(iter(run.get_train_dataloader()))
        twin = copy.deepcopy(run.model)
        wanted = torch.cat(run.compute_ref_log_probs(run.model, batch))
        with torch.no_grad():
            for value in run.model.parameters():
                value.mul_(1.3)
        assert torch.equal(torch.cat(run.compute_ref_log_probs(twin, batch)), wanted)
        assert not torch.equal(torch.cat(run.compute_ref_log_probs(run.model, batch)), wanted)
        reference = twin

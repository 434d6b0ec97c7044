"""Axolotl's own trainings with the plugin: against its own losses, and what the plugin refuses."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl")
from axolotl.utils.dict import DictDefault  # noqa: E402
from axolotl_inputs import OURS, history, run, train, weights, write_config  # noqa: E402

from benchmarks.framework_inputs import pairs, points, write_model, write_rows  # noqa: E402
from fused_prefopt.integrations.axolotl import FusedPlugin  # noqa: E402
from fused_prefopt.integrations.axolotl.options import (  # noqa: E402
    TRAINERS,
    FusedArgs,
    options_read,
    require_supported,
    training_arguments,
)

LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj"],
    "learning_rate": 1.0,
}
# Steps of several batches, and evaluations between them.
STEPS = {
    "gradient_accumulation_steps": 2,
    "val_set_size": 0.25,
    "eval_steps": 1,
    "eval_batch_size": 2,
}
# Axolotl's own trainings, of which the plugin's must be the same.
CASES: dict[str, dict[str, Any]] = {
    "dpo": {"rl": "dpo", "lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.5, **STEPS},
    "dpo-sum": {
        "rl": "dpo",
        "rl_beta": 0.3,
        "dpo_loss_type": ["sigmoid", "bco_pair", "sft"],
        "dpo_loss_weights": [0.8, 0.2, 1.0],
    },
    "dpo-precomputed": {"rl": "dpo", "precompute_ref_log_probs": True},
    "dpo-weighted": {"rl": "dpo", "dpo_use_weighting": True},
    "dpo-padding-free": {"rl": "dpo", "dpo_padding_free": True},
    "dpo-lora": {"rl": "dpo", **LORA},
    "ipo": {"rl": "ipo", "rl_beta": 0.2},
    "simpo": {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 0.6, **STEPS},
    "simpo-messages": {
        "rl": "simpo",
        "simpo_gamma": 0.6,
        "rows": "messages",
        "chat_template": "chatml",
        "skip_prepare_dataset": True,
    },
    "simpo-lora": {"rl": "simpo", "simpo_gamma": 0.6, "cpo_alpha": 0.0, **LORA},
    "orpo": {"rl": "orpo", "orpo_alpha": 0.3, "pad_to_multiple_of": 8, **STEPS},
    "kto": {
        "rl": "kto",
        "rl_beta": 0.3,
        "kto_undesirable_weight": 1.2,
        "remove_unused_columns": False,
        **STEPS,
    },
}
FUSED = "fused_prefopt.integrations.axolotl.FusedPlugin"
ALPHA = {"loss": "alpha-dpo", "loss_kwargs": {"alpha": 0.1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("axolotl")
    write_model(found / "model")
    write_rows(found / "pairs.jsonl", pairs(16))
    write_rows(found / "points.jsonl", points(16))
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    write_rows(
        found / "messages.jsonl",
        [
            {key: [{"role": role, "content": row[key]}] for key, role in roles.items()}
            for row in pairs(16)
        ],
    )
    return found


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_those_of_axolotls_own_loss(folder, name):
    changes = CASES[name]
    ours = write_config(folder, f"{name}-ours", ours=True, **changes | {"fused_prefopt": {}})
    own = write_config(folder, f"{name}-own", ours=False, **changes)
    # Training arguments get the plugin's field when they are first imported.
    train(ours, own)
    tolerances = {"loss": 1e-5, "eval_loss": 1e-5, "grad_norm": 1e-4, "learning_rate": 0}
    logged = list(zip(history(own), history(ours), strict=True))
    assert sum("loss" in wanted for wanted, _ in logged) == 3
    assert any("eval_loss" in wanted for wanted, _ in logged) == ("eval_steps" in changes)
    for wanted, got in logged:
        assert ("nonfinite" in got) == ("loss" in got) and "nonfinite" not in wanted
        for key, tolerance in tolerances.items():
            if key in wanted:
                assert got[key] == pytest.approx(wanted[key], rel=tolerance)
    before, wanted, got = weights(folder / "model.yaml"), weights(own), weights(ours)
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        change = (value - before[key] if key in before else value).abs().max()
        assert change > 0
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5 * float(change))
    # TRL's copy of an adapter, where nothing is compared with it.
    if changes["rl"] == "simpo":
        assert not (ours.with_suffix("") / "ref").exists()


def test_the_example_trains_by_axolotls_command_and_resumes_with_its_statistics(folder):
    four = {"max_steps": 4, "save_steps": 2, "lr_scheduler": "cosine"}
    whole = write_config(folder, "whole", ours=True, fused_prefopt=ALPHA, **four)
    command = Path(sys.executable).with_name("axolotl")
    done = run(command, "train", "--launcher", "python", whole)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {"margin/mean", "kl/chosen"} <= history(whole, 4)[0].keys()
    half = whole.with_suffix("") / "checkpoint-2"
    statistics = torch.load(half / "preference_loss.pt", weights_only=True)
    assert statistics
    shutil.copytree(half, folder / "half" / "checkpoint-2")
    resumed = {**four, "fused_prefopt": ALPHA, "output_dir": str(folder / "resumed")}
    start = str(folder / "half" / "checkpoint-2")
    config = write_config(folder, "resumed", ours=True, resume_from_checkpoint=start, **resumed)
    train(config)
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(config)[key], value, rtol=0, atol=0)
    ends = (c.with_suffix("") / "checkpoint-4" / "preference_loss.pt" for c in (whole, config))
    first, second = (torch.load(end, weights_only=True) for end in ends)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert any(not torch.equal(first[key], statistics[key]) for key in first)


def test_a_wrong_option_ends_axolotls_command(folder):
    config = write_config(folder, "wrong", ours=True, fused_prefopt={"los": "dpo"})
    done = run(sys.executable, "-m", "axolotl.cli.train", config)
    assert done.returncode != 0
    assert "fused_prefopt: got 'los' (did you mean 'loss'" in done.stderr


REFUSED = [
    ({"rl": "grpo"}, "rl: got 'grpo'.*wanted one of dpo, ipo, simpo, orpo, kto"),
    ({}, "rl: got None"),
    ({"rl": "simpo"}, "simpo_gamma: got None"),
    ({"rl": "dpo", "simpo_gamma": 0.5}, "simpo_gamma: got 0.5 with rl: dpo"),
    ({"rl": "dpo", "orpo_alpha": 0.5}, "orpo_alpha: got 0.5 with rl: dpo"),
    ({"rl": "simpo", "simpo_gamma": 1.0, "dpo_label_smoothing": 0.1}, "dpo_label_smoothing"),
    # TRL's own would not read it.
    ({"rl": "dpo", "dpo_label_smoothing": 0.1}, "label_smoothing: got 0.1"),
    ({"rl": "kto", "dpo_use_weighting": True}, "dpo_use_weighting: got True with rl: kto"),
    ({"rl": "orpo", "dpo_padding_free": True}, "dpo_padding_free: got True with rl: orpo"),
    ({"rl": "dpo", "trl": {"sync_ref_model": True}}, "trl.sync_ref_model: got True with rl: dpo"),
    ({"rl": "kto", "kto_desirable_weight": 0.0}, "kto_desirable_weight: got 0, which Axolotl"),
    ({"rl": "orpo", "orpo_alpha": 0.1, "rl_beta": 0.2}, "orpo_alpha: got 0.1 and rl_beta 0.2"),
    ({"rl": "orpo", "precompute_ref_log_probs": True}, "precompute_ref_log_probs: got True"),
    ({"rl": "dpo", "rl_adapter_ref_model": True}, "rl_adapter_ref_model: got True, which Axolotl"),
    ({"rl": "dpo", "context_parallel_size": 2}, "context_parallel_size: got 2"),
    ({"rl": "dpo", "fused_prefopt": {"beta": 0.1}}, "fused_prefopt: got beta=0.1 without a loss"),
    ({"rl": "orpo", "fused_prefopt": ALPHA}, "alpha-dpo needs rl: dpo"),
    (
        {"rl": "dpo", "dpo_loss_type": ["hinge"], "fused_prefopt": ALPHA},
        "dpo_loss_type: got .* with loss 'alpha-dpo'; give one of them",
    ),
    (
        {"rl": "dpo", "rl_beta": 0.2, "fused_prefopt": {"loss": "slic-hf"}},
        "rl_beta: got 0.2, but slic-hf has no hyperparameter 'beta'",
    ),
    (
        {"rl": "dpo", "rl_beta": 0.2, "fused_prefopt": {"loss": "dpo", "beta": 0.3}},
        "rl_beta: got 0.2 and beta=0.3 in loss_kwargs",
    ),
    (
        {"rl": "dpo", "precompute_ref_log_probs": True, "fused_prefopt": {"loss": "simpo"}},
        "precompute_ref_log_probs: got True with simpo",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_an_option_without_an_effect_is_refused_by_its_name(options, message):
    with pytest.raises(ValueError, match=message):
        training_arguments(DictDefault(options))


@pytest.mark.parametrize(
    ("options", "loss", "hyperparameters"),
    [
        ({"rl": "simpo", "simpo_gamma": 0.5}, "simpo + 1.0 sft", {"beta": 0.1, "gamma": 0.5}),
        ({"rl": "orpo", "trl": {"beta": 0.2}}, "orpo", {"weight": 0.2, "nll": "whole_token_mean"}),
        (
            {"rl": "simpo", "simpo_gamma": 0.5, "fused_prefopt": {"loss": "simpo"}},
            "simpo",
            {"gamma": 0.5},
        ),
        (
            {"rl": "dpo", "rl_beta": 2.0, "fused_prefopt": ALPHA},
            "alpha-dpo",
            {"alpha": 0.1, "beta": 2.0},
        ),
        # What is switched off says nothing.
        (
            {
                "rl": "kto",
                "dpo_use_weighting": False,
                "dpo_padding_free": False,
                "dpo_label_smoothing": 0.0,
                "trl": {"sync_ref_model": False},
            },
            "kto",
            {},
        ),
    ],
)
def test_axolotls_hyperparameters_reach_the_loss(options, loss, hyperparameters):
    found = training_arguments(DictDefault(options))["fused_prefopt"]
    assert (found["loss"], found["loss_kwargs"]) == (loss, hyperparameters)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_options_of_each_rl_are_those_that_axolotl_reads(monkeypatch, tmp_path, kind):
    from axolotl.core.builders.rl import HFRLTrainerBuilder
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from axolotl.utils.schemas.enums import RLType
    from axolotl.utils.schemas.trl import TRLConfig

    names: set[str] = set()
    builder = object.__new__(HFRLTrainerBuilder)
    builder.cfg = Asked(names, "", {"rl": RLType(kind), "trl": Asked(names, "trl.", {})})
    base = {"output_dir": str(tmp_path), "bf16": False}, {}
    monkeypatch.setattr(builder, "_set_base_training_args", lambda total_num_steps: base)
    builder._build_training_arguments(3)
    others = {"rl", "trl", "plugins", "remove_unused_columns", "sequence_len", "use_wandb"}
    # Axolotl takes it for any β.
    others |= set() if kind == "orpo" else {"orpo_alpha"}
    # The plugin's own business, and its warning's.
    others |= {"precompute_ref_log_probs", "dpo_use_liger_kernel"}
    assert names - others == options_read(kind)
    # A name that the schema does not have never gets here.
    schema = {*AxolotlInputConfig.model_fields, *(f"trl.{name}" for name in TRLConfig.model_fields)}
    assert options_read(kind) <= schema
    assert "rl_adapter_ref_model" not in schema


class Asked:
    """A configuration that notes which options are read; those that are not given are None."""

    def __init__(self, names: set[str], prefix: str, given: dict[str, Any]) -> None:
        self._noted = names, prefix, given

    def __getattr__(self, name: str) -> Any:
        names, prefix, given = self._noted
        names.add(prefix + name)
        return given.get(name)


def test_ligers_loss_is_switched_off_and_told(caplog):
    options = {"rl": "dpo", "dpo_use_liger_kernel": True, "plugins": [FUSED]}
    found = FusedPlugin().get_training_args(DictDefault(options))
    assert found["use_liger_kernel"] is False
    assert "dpo_use_liger_kernel: switched off" in caplog.text


def test_options_may_be_a_text():
    assert FusedArgs(fused_prefopt='{"loss": "dpo"}').fused_prefopt == {"loss": "dpo"}
    for wrong in ("[1]", {"losses": "dpo"}):
        with pytest.raises(ValueError, match="fused_prefopt: got"):
            FusedArgs(fused_prefopt=wrong)


def test_the_plugin_names_the_trainer_and_notices_another():
    plugin = FusedPlugin()
    path = "fused_prefopt.integrations.axolotl.trainers.AxolotlFused"
    for kind, name in (("dpo", "DPO"), ("orpo", "DPO"), ("kto", "KTO")):
        config = {"rl": kind, "plugins": [FUSED]}
        plugin.register(config)
        assert config["trainer_cls"] == f"{path}{name}Trainer"
    with pytest.raises(ValueError, match="trainer_cls: got 'mine.Trainer'"):
        plugin.register({"rl": "dpo", "plugins": [FUSED], "trainer_cls": "mine.Trainer"})
    # Of an earlier configuration in the same process.
    other = {"rl": "grpo", "plugins": ["another.Plugin"]}
    plugin.register(other)
    assert "trainer_cls" not in other
    # Without `rl` Axolotl generates; it would train on texts.
    generating = {"rl": None, "plugins": [FUSED], "inference": True}
    plugin.register(generating)
    assert "trainer_cls" not in generating
    plugin.pre_model_load(DictDefault({"rl": None, "plugins": [FUSED]}))
    with pytest.raises(ValueError, match="rl: got None"):
        plugin.register({"plugins": [FUSED]})
    with pytest.raises(ValueError, match="whose get_trainer_cls gives SimpleNamespace"):
        plugin.post_trainer_create(
            DictDefault({"rl": "dpo", "plugins": [FUSED]}), SimpleNamespace()
        )


def test_the_trainer_wants_its_plugin(tmp_path):
    from axolotl.core.trainers.dpo.args import AxolotlDPOConfig

    from fused_prefopt.integrations.axolotl.trainers import AxolotlFusedDPOConfig, fused_config

    given = AxolotlDPOConfig(output_dir=str(tmp_path), bf16=False)
    with pytest.raises(ValueError, match="without its plugin"):
        fused_config(AxolotlFusedDPOConfig, given)


def test_two_lines_are_ours():
    require_supported({"rl": "dpo"})
    text = (Path(__file__).parents[2] / "examples/frameworks/axolotl.yaml").read_text()
    marked = [line for line in text.splitlines() if line.endswith("# ours")]
    assert [line.partition(":")[0] for line in marked] == list(OURS)

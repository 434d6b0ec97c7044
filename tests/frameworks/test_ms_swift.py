"""ms-swift's own command, with its own losses and with those of this package."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("swift", reason="needs ms-swift")

import torch
import yaml
from safetensors.torch import load_file
from swift.arguments import SftArguments
from swift.pipelines import rlhf_main
from swift.trainers import TrainerFactory
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import fused_prefopt
from benchmarks.framework_inputs import pairs, points, write_model, write_rows
from fused_prefopt.integrations.trainer_mixins import LOSS_STATE

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "frameworks" / "ms_swift_plugin.py"
PLUGIN = Path(fused_prefopt.__file__).parent / "integrations" / "ms_swift" / "__init__.py"
# Names of ms-swift's own trainers, whatever this process has imported.
OWN = {kind: f"swift.rlhf_trainers.{kind.upper()}Trainer" for kind in ("dpo", "kto", "cpo", "orpo")}
FULL = ("--tuner_type", "full")
# Weights move by their gradients, so that what differs in these shows.
SGD = ("--optim", "sgd", "--learning_rate", "0.1")
# 8 rows, 2 a batch, 3 batches a step: an epoch's last step is of one batch.
SETTINGS = {
    "model_type": "llama",
    "template": "default",
    "check_model": "false",
    "use_hf": "true",
    "torch_dtype": "float32",
    "max_length": 128,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "split_dataset_ratio": 0,
    "load_from_cache_file": "false",
    "dataloader_num_workers": 0,
    "dataset_num_proc": 1,
    "add_version": "false",
    "report_to": "none",
    "disable_tqdm": "true",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [
        {"messages": _chat(row["prompt"], row["chosen"]), "rejected_response": row["rejected"]}
        for row in pairs(8)
    ]
    single = [
        {"messages": _chat(row["prompt"], row["completion"]), "label": row["label"]}
        for row in points(8)
    ]
    return {
        "model": write_model(folder / "model"),
        "pairs": write_rows(folder / "pairs.jsonl", rows),
        "points": write_rows(folder / "points.jsonl", single),
    }


def _chat(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.fixture
def train(inputs, tmp_path, monkeypatch):
    """Trains by ms-swift's command in this process: its options → its last message.

    `fused` adds the plugin, `entry` the mapping that is ours.
    """
    monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", TrainerFactory.TRAINER_MAPPING | OWN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = iter(range(9))

    def run(kind, *options, fused=False, entry=None, plugin=PLUGIN, **settings):
        TrainerFactory.TRAINER_MAPPING |= OWN
        monkeypatch.setenv("FUSED_PREFOPT", "")
        for name in [name for name in sys.modules if name.startswith("_swift_external_")]:
            del sys.modules[name]
        rows = inputs["points" if kind == "kto" else "pairs"]
        given = SETTINGS | {"output_dir": tmp_path / f"run{next(count)}"} | settings
        words = [f"--rlhf_type={kind}", "--model", inputs["model"], "--dataset", rows]
        words += [word for name, value in given.items() for word in (f"--{name}", str(value))]
        if fused:
            words += ["--external_plugins", str(plugin)]
        if entry is not None:
            words += ["--model_kwargs", json.dumps({"fused_prefopt": entry})]
        torch.manual_seed(0)
        return rlhf_main([*words, *options])

    return run


def losses_of(result) -> list[float]:
    return [row["loss"] for row in result["log_history"] if "loss" in row]


def weights_of(result) -> dict[str, torch.Tensor]:
    (file,) = Path(result["last_model_checkpoint"]).glob("*model.safetensors")
    return load_file(file)


def assert_equal(found, wanted, keys=("rewards/margins", "logps/chosen")):
    """Losses, metrics and trained weights are the same to 1e-5."""
    assert losses_of(found) == pytest.approx(losses_of(wanted), rel=1e-5, abs=1e-5)
    last = [[row for row in one["log_history"] if "loss" in row][-1] for one in (found, wanted)]
    for key in keys:
        assert last[0][key] == pytest.approx(last[1][key], rel=1e-4, abs=1e-5), key
    ours, theirs = weights_of(found), weights_of(wanted)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)


SAVED = {"save_strategy": "steps", "save_steps": 3}
OF_DPO = {
    "sigmoid": (),
    "smoothed": ("--label_smoothing", "0.1", "--beta", "0.3"),
    "robust": ("--loss_type", "robust", "--label_smoothing", "0.1"),
    "exo_pair": ("--loss_type", "exo_pair"),
    "hinge": ("--loss_type", "hinge", "--beta", "0.02"),
    "ipo": ("--loss_type", "ipo"),
    "bco_pair": ("--loss_type", "bco_pair", "--beta", "0.5"),
    "sppo_hard": ("--loss_type", "sppo_hard", "--beta", "1"),
    "nca_pair": ("--loss_type", "nca_pair"),
    "aot": ("--loss_type", "aot", "--label_smoothing", "0.1"),
    "aot_unpaired": ("--loss_type", "aot_unpaired"),
    "apo_zero": ("--loss_type", "apo_zero"),
    "apo_down": ("--loss_type", "apo_down"),
    "discopop": ("--loss_type", "discopop", "--discopop_tau", "0.1"),
    "sft": ("--loss_type", "sft"),
    "a sum": ("--loss_type", "sigmoid", "ipo", "sft", "--loss_weights", "0.8", "0.01", "1"),
    "rpo_alpha": ("--rpo_alpha", "0.1"),
    "ld_alpha": ("--ld_alpha", "0.5"),
    "ld_alpha of ipo": ("--ld_alpha", "0.5", "--loss_type", "ipo"),
}
OF_OTHERS = {
    "cpo": ("cpo",),
    "smoothed cpo": ("cpo", "--label_smoothing", "0.1"),
    "hinge": ("cpo", "--loss_type", "hinge", "--beta", "0.05"),
    "simpo with likelihood": ("simpo", "--simpo_gamma", "0.5"),
    "simpo": ("simpo", "--cpo_alpha", "0", "--label_smoothing", "0.1"),
    "orpo": ("orpo", "--beta", "0.5"),
    "kto": ("kto", "--desirable_weight", "1.5"),
    "apo_zero_unpaired": ("kto", "--loss_type", "apo_zero_unpaired"),
}


@pytest.mark.parametrize("options", OF_DPO.values(), ids=OF_DPO.keys())
def test_its_own_losses_on_pairs_are_the_same(train, options):
    wanted = train("dpo", *FULL, *SGD, *options, **SAVED)
    found = train("dpo", *FULL, *SGD, *options, fused=True, **SAVED)
    # IPO's rewards are not scaled by its τ here, and a sum's are those of its first term.
    others = {"ipo", "sft"} & set(options)
    assert_equal(found, wanted, () if others else ("rewards/margins",))
    assert len(set(losses_of(found))) == 3


@pytest.mark.parametrize("options", OF_OTHERS.values(), ids=OF_OTHERS.keys())
def test_its_other_trainers_are_the_same(train, options):
    kind, *options = options
    wanted = train(kind, *FULL, *SGD, *options, **SAVED)
    assert_equal(train(kind, *FULL, *SGD, *options, fused=True, **SAVED), wanted, ())


LORA = ("--tuner_type", "lora", "--target_modules", "q_proj", "v_proj", *SGD)
ADAPTERS = {
    "dpo": ("dpo", *LORA),
    "kto": ("kto", *LORA),
    "simpo": ("simpo", *LORA),
    "dora": ("dpo", *LORA, "--use_dora", "true"),
    "on the head": ("dpo", *LORA, "--target_modules", "lm_head", "q_proj"),
    "boft": ("dpo", "--tuner_type", "boft", *SGD),
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_adapters_train_alike(train, options):
    assert_equal(train(*options, fused=True, **SAVED), train(*options, **SAVED), ())


def test_an_adapter_compares_with_another_one(train):
    start = train("dpo", *LORA, **SAVED)["last_model_checkpoint"]
    options = (*LORA, "--adapters", start, "--ref_adapters", start)
    wanted, found = (train("dpo", *options, fused=fused, **SAVED) for fused in (False, True))
    assert losses_of(found) == pytest.approx(losses_of(wanted), rel=1e-5)
    assert losses_of(found)[0] == pytest.approx(0.6931472, abs=1e-5)


@pytest.mark.parametrize("layout", ["padding_free", "packing"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_packed_rows_are_the_same(train, monkeypatch, kind, layout):
    # Both want flash attention, which no CPU has; sdpa takes position_ids for borders, too.
    monkeypatch.setattr(SftArguments, "_check_padding_free", _takes_any_attention)
    options = (*FULL, *SGD, f"--{layout}", "true", "--attn_impl", "sdpa", "--packing_length", "128")
    wanted = train(kind, *options, **SAVED)
    assert_equal(train(kind, *options, fused=True, **SAVED), wanted, ())


def _takes_any_attention(args):
    args.padding_free = args.padding_free or args.packing


@pytest.mark.parametrize(
    "options",
    [("dpo", "--padding_side", "left"), ("kto", "--padding_side", "left")],
    ids=["dpo", "kto"],
)
def test_rows_padded_on_the_left_are_the_same(train, options):
    kind, *options = options
    wanted = train(kind, *FULL, *SGD, *options, **SAVED)
    assert_equal(train(kind, *FULL, *SGD, *options, fused=True, **SAVED), wanted, ())


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("dpo", {"loss": "alpha-dpo", "loss_kwargs": {"alpha": 0.1}, "log_tokens": True}),
        ("dpo", {"loss": "tdpo2"}),
        ("dpo", {"loss": "gamma-dpo + 0.1 sft"}),
        ("kto", {"loss": "dro"}),
    ],
    ids=["alpha-dpo", "tdpo2", "sum", "dro"],
)
def test_packed_rows_have_the_losses_of_padded_ones(train, monkeypatch, kind, entry):
    monkeypatch.setattr(SftArguments, "_check_padding_free", _takes_any_attention)
    options = (*FULL, *SGD, "--attn_impl", "sdpa")
    padded, packed = (
        train(kind, *options, "--padding_free", free, fused=True, entry=entry, **SAVED)
        for free in ("false", "true")
    )
    assert_equal(packed, padded, ())
    names = {"entropy", "logits/chosen", "rewards/chosen"} & set(padded["log_history"][0])
    for name in names:
        values = [[r[name] for r in one["log_history"] if name in r] for one in (packed, padded)]
        assert values[0] == pytest.approx(values[1], abs=1e-4), name


@pytest.mark.parametrize("kind", ["dpo", "cpo"])
def test_a_mixture_of_experts_is_the_same(train, inputs, tmp_path, kind):
    folder = tmp_path / "experts"
    shutil.copytree(inputs["model"], folder)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = MixtralConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    options = (*FULL, *SGD, "--model", str(folder), "--router_aux_loss_coef", "0.5")
    settings = SAVED | {"model_type": "mixtral"}
    wanted, found = (train(kind, *options, fused=fused, **settings) for fused in (False, True))
    assert_equal(found, wanted, ("aux_loss",) if kind == "dpo" else ())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("dpo", ("eval_rewards/margins", "eval_logps/rejected")),
        ("kto", ("eval_kl",)),
        ("simpo", ("eval_rewards/margins",)),
    ],
    ids=["dpo", "kto", "simpo"],
)
def test_an_evaluation_is_the_same(train, inputs, kind, names):
    rows = inputs["points" if kind == "kto" else "pairs"]
    options = (*FULL, *SGD, "--val_dataset", rows, "--eval_strategy", "steps")
    settings = {"eval_steps": 3, "per_device_eval_batch_size": 4}
    wanted, found = (train(kind, *options, fused=fused, **settings) for fused in (False, True))
    rows = [next(r for r in one["log_history"] if "eval_loss" in r) for one in (wanted, found)]
    for name in ("eval_loss", *names):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-5), name


def test_statistics_are_resumed(train):
    options = (*FULL, "--learning_rate", "1e-3")
    entry = {"loss": "alpha-dpo", "loss_kwargs": {"alpha": 0.1}}
    settings = {"entry": entry, "fused": True, "save_strategy": "steps", "save_steps": 2}
    whole = train("dpo", *options, max_steps=4, **settings)
    middle = Path(whole["last_model_checkpoint"]).with_name("checkpoint-2")
    state = torch.load(middle / LOSS_STATE, weights_only=True)
    assert any(value.any() for value in state.values())
    resumed = train(
        "dpo", *options, "--resume_from_checkpoint", str(middle), max_steps=4, **settings
    )
    assert losses_of(resumed)[-2:] == pytest.approx(losses_of(whole)[-2:], rel=1e-6)
    last = [Path(one["last_model_checkpoint"]) / LOSS_STATE for one in (whole, resumed)]
    one, other = (torch.load(path, weights_only=True) for path in last)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("dpo", {"loss": "alpha-dpo", "loss_kwargs": {"alpha": 0.1}, "log_tokens": True}),
        ("dpo", {"loss": "gamma-dpo + 0.1 sft", "workspace_mb": 1, "on_nonfinite": "skip"}),
        ("dpo", {"loss": "tdpo2"}),
        ("simpo", {"loss": "gamma-simpo", "beta": 5}),
        ("kto", {"loss": "dro"}),
    ],
    ids=["alpha-dpo", "sum", "tdpo2", "gamma-simpo", "dro"],
)
def test_losses_of_this_package_train(train, kind, entry, caplog):
    found = train(kind, *FULL, "--learning_rate", "1e-2", fused=True, entry=entry, max_steps=9)
    losses = losses_of(found)
    assert losses[-1] < losses[0]
    name = entry["loss"].split()[0]
    assert name in caplog.text


def test_beta_reaches_a_loss_of_the_entry(train):
    one = train("dpo", *FULL, *SGD, "--beta", "0.5", fused=True, entry={"loss": "dpo"}, **SAVED)
    other = train("dpo", *FULL, *SGD, "--beta", "0.5", **SAVED)
    assert_equal(one, other)


@pytest.mark.parametrize(
    ("kind", "options", "entry", "message"),
    [
        ("dpo", ("--loss_scale", "react"), None, "loss_scale: got 'react'"),
        ("dpo", (), {"loss": "alhpa-dpo"}, "did you mean 'alpha-dpo'"),
        ("dpo", ("--loss_type", "sigmod"), None, "did you mean 'sigmoid'"),
        ("dpo", ("--rpo_alpha", "1"), {"loss": "dpo"}, "rpo_alpha: got 1.0, an option of ms-swift"),
        ("dpo", (), {"loss": "odpo"}, "odpo needs `rewards`"),
        ("dpo", (), {"loss": "kto"}, "point-wise, wanted one on pairs"),
        ("cpo", (), {"loss": "dpo"}, "train it with 'dpo'"),
    ],
)
def test_what_is_not_honoured_is_refused(train, kind, options, entry, message):
    with pytest.raises(ValueError, match=message):
        train(kind, *FULL, *options, fused=True, entry=entry)


def test_other_tuners_are_refused(train):
    options = ("--tuner_type", "llamapro", "--llamapro_num_new_blocks", "1")
    with pytest.raises(ValueError, match="tuner_type: got 'llamapro', which makes a SwiftModel"):
        train("dpo", *options, fused=True)


def test_a_gradient_that_is_not_finite_stops(train):
    """ms-swift alone would take gradients whose norm is NaN away, and go on."""
    entry = {"loss": "dpo", "loss_kwargs": {"beta": 3e38}}
    with pytest.raises(FloatingPointError, match="step 1: got a gradient of nan with"):
        train("dpo", *FULL, *SGD, fused=True, entry=entry)


def command(inputs, folder, entry, **settings):
    """Its command in a process of its own, with a YAML file; its messages, and what it logged."""
    config = {
        **SETTINGS,
        "rlhf_type": "dpo",
        "model": inputs["model"],
        "dataset": inputs["pairs"],
        "tuner_type": "full",
        "output_dir": str(folder / "out"),
        "external_plugins": [str(EXAMPLE)],
        "model_kwargs": {"fused_prefopt": entry},
        **settings,
    }
    file = folder / "dpo.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "swift.cli.main", "rlhf", file],
        capture_output=True,
        text=True,
        env=os.environ | environment | config.pop("ENV", {}),
    )
    assert done.returncode == 0, done.stderr
    logged = (folder / "out" / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    return done.stderr, [row for row in map(json.loads, logged) if "loss" in row]


def test_its_command_reads_yaml(inputs, tmp_path):
    entry = {"loss": "alpha-dpo", "loss_kwargs": {"alpha": 0.1}}
    messages, rows = command(inputs, tmp_path, entry, **SAVED)
    assert "alpha-dpo, beta=10.0, gamma=4.0, alpha=0.1" in messages
    assert len(rows) == 3 and all("rewards/margins" in row for row in rows)
    assert (tmp_path / "out" / "checkpoint-3" / LOSS_STATE).is_file()


def test_two_processes_train_as_one(inputs, tmp_path, train):
    entry = {"loss": "alpha-dpo", "loss_kwargs": {"alpha": 0.1}}
    settings = {"train_dataloader_shuffle": "false", "gradient_accumulation_steps": 2}
    one = train("dpo", *FULL, *SGD, fused=True, entry=entry, **settings)
    # Without `use_cpu` its processes on a CPU do not share their gradients.
    settings |= {"per_device_train_batch_size": 1, "ddp_backend": "gloo", "use_cpu": "true"}
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {"NPROC_PER_NODE": "2", "MASTER_PORT": str(port)}
    settings |= {"optim": "sgd", "learning_rate": 0.1, "ENV": environment}
    _, rows = command(inputs, tmp_path, entry, **settings)
    assert [row["loss"] for row in rows] == pytest.approx(losses_of(one), rel=1e-5)

"""LLaMA-Factory's own command, started by `fused-prefopt llamafactory`, beside its own losses.

The gradients are compared as the weights after steps of plain SGD, at a learning rate of 1.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from benchmarks.framework_inputs import byte_tokenizer, pairs, points, write_model, write_rows

pytest.importorskip("llamafactory")
STAND_INS = Path(__file__).parent / "stand_ins"
if find_spec("torchaudio") is None:
    sys.path.append(str(STAND_INS))
from llamafactory import cli, launcher  # noqa: E402
from llamafactory.hparams import FinetuningArguments, parser  # noqa: E402
from llamafactory.train.dpo.trainer import CustomDPOTrainer  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import DPOTrainer  # noqa: E402

from fused_prefopt.cli.main import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "frameworks" / "llamafactory.yaml"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SETTINGS = {
    "do_train": True,
    "template": "default",
    "cutoff_len": 128,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "optim": "sgd",
    "max_grad_norm": 1e9,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_shuffling": True,
    "preprocessing_num_workers": 1,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """Options of a model, a reference and data on the disk."""
    folder = tmp_path_factory.mktemp("inputs")
    write_rows(folder / "pairs.jsonl", pairs())
    write_rows(folder / "points.jsonl", points())
    names = {name: name for name in ("prompt", "chosen", "rejected")}
    judged = {"prompt": "prompt", "response": "completion", "kto_tag": "label"}
    data = {
        "pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": names},
        "points": {"file_name": "points.jsonl", "columns": judged},
    }
    (folder / "dataset_info.json").write_text(json.dumps(data), encoding="utf-8")
    return {
        "model_name_or_path": write_model(folder / "model"),
        "ref_model": write_model(folder / "reference", seed=1),
        "dataset_dir": str(folder),
    }


class Run:
    """What a training left on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        (path,) = self.folder.glob("*model.safetensors")
        return load_file(path)

    @property
    def logs(self) -> list[dict[str, float]]:
        path = self.folder / "trainer_state.json"
        return json.loads(path.read_text(encoding="utf-8"))["log_history"]

    def logged(self, name: str) -> list[float]:
        return [row[name] for row in self.logs if name in row]


def words(given: dict[str, object]) -> list[str]:
    """Overrides as LLaMA-Factory's command line takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def configured(folder: Path, inputs: dict[str, str], options: dict[str, object]) -> str:
    """Path of a YAML file; YAML reads JSON."""
    given = SETTINGS | inputs | {"stage": "dpo", "finetuning_type": "full"} | options
    given.setdefault("dataset", "points" if given["stage"] == "kto" else "pairs")
    if given["finetuning_type"] == "lora":
        del given["ref_model"]
    given = {key: value for key, value in given.items() if value is not None}
    path = folder / "train.yaml"
    path.write_text(json.dumps(given | {"output_dir": str(folder / "out")}), encoding="utf-8")
    return str(path)


def ours(folder: Path, inputs: dict[str, str], **options: object) -> Run:
    folder.mkdir(exist_ok=True)
    assert main(["llamafactory", "train", configured(folder, inputs, options)]) == 0
    return Run(folder / "out")


def own(folder: Path, inputs: dict[str, str], **options: object) -> Run:
    """LLaMA-Factory's command without this package."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["llamafactory-cli", "train"])
        sys.argv.append(configured(folder, inputs, options))
        cli.main()
    return Run(folder / "out")


@contextlib.contextmanager
def named_loss():
    """LLaMA-Factory's trainer, which tells TRL's `dpo_loss` the loss of its name.

    TRL asks for it since 0.20 and takes "sigmoid" else; LLaMA-Factory 0.9.5 does not tell it.
    """

    def loss(trainer, *logps):
        return partial(DPOTrainer.dpo_loss, trainer, loss_type=trainer.loss_type)(*logps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CustomDPOTrainer, "dpo_loss", loss)
        yield


CASES = {
    "sigmoid": {"dpo_label_smoothing": 0.1},
    "sigmoid, lora": {"finetuning_type": "lora", "lora_target": "all", "pref_beta": 0.5},
    "sigmoid, freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "sigmoid, without ref_model": {"ref_model": None},
    "sigmoid, nll": {"pref_ftx": 0.3},
    "sigmoid, ld_alpha": {"ld_alpha": 0.4, "pref_ftx": 0.2},
    "sigmoid, bco": {"pref_bco_weight": 0.5, "pref_ftx": 0.2, "dpo_label_smoothing": 0.1},
    "hinge, bco": {"pref_loss": "hinge", "pref_bco_weight": 2.0, "pref_beta": 0.3},
    "ipo, bco": {"pref_loss": "ipo", "pref_bco_weight": 20.0, "pref_beta": 0.4},
    "hinge": {"pref_loss": "hinge"},
    "ipo": {"pref_loss": "ipo", "pref_beta": 0.2},
    "orpo": {"pref_loss": "orpo", "pref_beta": 0.2},
    "simpo": {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 0.7},
    "simpo, nll": {"pref_loss": "simpo", "pref_ftx": 0.3},
    "kto": {"stage": "kto", "kto_chosen_weight": 1.5, "kto_rejected_weight": 0.7},
    "kto, lora": {"stage": "kto", "finetuning_type": "lora", "pref_beta": 0.5},
    "simpo, ld_alpha": {"pref_loss": "simpo", "ld_alpha": 0.3},
    "orpo, nll": {"pref_loss": "orpo", "pref_ftx": 0.3},
}
# Of 7 rows the last batch is of one, and the last step of each epoch of one batch.
EPOCHS = {
    "max_steps": None,
    "num_train_epochs": 2,
    "max_samples": 7,
    "gradient_accumulation_steps": 3,
}
CASES |= {f"{case}, epochs": CASES[case] | EPOCHS for case in ("sigmoid", "sigmoid, bco", "kto")}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_llamafactory(case, tmp_path, inputs):
    options = CASES[case]
    mine = ours(tmp_path / "ours", inputs, **options)
    with named_loss():
        theirs = own(tmp_path / "own", inputs, **options)
    torch.testing.assert_close(mine.weights, theirs.weights, **CLOSE)
    assert mine.logged("loss") == pytest.approx(theirs.logged("loss"), abs=1e-5)
    assert mine.logged("grad_norm") == pytest.approx(theirs.logged("grad_norm"), rel=1e-4)
    assert len(mine.logged("loss")) == (4 if "epochs" in case else 2)
    # The step moved something, and the reference is another model where there is one.
    assert max(mine.logged("grad_norm")) > 0.05
    names = set(theirs.logs[0]) - {"logits/chosen", "logits/rejected"}
    if options.get("pref_loss") == "orpo":
        names -= {"sft_loss", "odds_ratio_loss"}
    assert names <= set(mine.logs[0])
    shared = {"logps/chosen", "logps/rejected", "rewards/accuracies", "rewards/margins"}
    if options.get("pref_loss") not in ("ipo", "orpo", "simpo") and "stage" not in options:
        for name in shared:
            assert mine.logged(name) == pytest.approx(theirs.logged(name), abs=1e-3), name


def test_llamafactorys_own_hinge_is_its_sigmoid(tmp_path, inputs):
    # Why the losses by name are compared inside `named_loss`: it falls when that is repaired.
    hinge = own(tmp_path / "hinge", inputs, pref_loss="hinge")
    torch.testing.assert_close(hinge.weights, own(tmp_path / "sigmoid", inputs).weights)


def write_pairs_with_images(folder: Path, count: int = 8) -> dict[str, object]:
    """Options of a tiny random LLaVA, and of pairs whose prompts begin with an image."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = CLIPVisionConfig(hidden_size=16, image_size=28, patch_size=14, **sizes)
    text = LlamaConfig(vocab_size=264, hidden_size=32, **sizes)
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
    LlavaForConditionalGeneration(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = pairs(count)
    for index, row in enumerate(rows):
        path = folder / f"{index}.png"
        Image.new("RGB", (28, 28), (30 * index, 200 - 20 * index, 90)).save(path)
        row |= {"prompt": f"<image>{row['prompt']}", "images": [str(path)]}
    write_rows(folder / "pairs.jsonl", rows)
    names = {name: name for name in rows[0]}
    data = {"pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": names}}
    (folder / "dataset_info.json").write_text(json.dumps(data), encoding="utf-8")
    model = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder)}
    # The template begins with a long text.
    return model | {"template": "llava", "cutoff_len": 400, "ref_model": None}


def test_images_reach_the_model_as_in_llamafactory(tmp_path, inputs):
    options = write_pairs_with_images(tmp_path)
    options |= {"finetuning_type": "lora", "lora_target": "all", "gradient_accumulation_steps": 1}
    options |= {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    mine = ours(tmp_path / "ours", inputs, **options)
    theirs = own(tmp_path / "own", inputs, **options)
    torch.testing.assert_close(mine.weights, theirs.weights, **CLOSE)
    assert mine.logged("loss") == pytest.approx(theirs.logged("loss"), abs=1e-5)
    # The vision tower's adapter has moved: the loss depends on the images.
    seen = [value for name, value in mine.weights.items() if "vision" in name and "lora_B" in name]
    assert seen and max(value.abs().max() for value in seen) > 1e-4


@pytest.mark.parametrize(
    ("stage", "loss", "first"),
    [
        ("dpo", "tdpo1", math.log(2)),
        ("dpo", "dpo + 0.2 bco-pair", 1.4 * math.log(2)),
        ("kto", "apo-zero-unpaired", 0.5),
        ("kto", "kto + 0.5 apo-zero-unpaired", 0.75),
    ],
)
def test_a_new_adapter_is_its_own_reference(stage, loss, first, tmp_path, inputs):
    options = {"stage": stage, "pref_loss": loss, "finetuning_type": "lora", "lora_target": "all"}
    run = ours(tmp_path, inputs, **options, gradient_accumulation_steps=1)
    losses = run.logged("loss")
    assert losses[0] == pytest.approx(first, abs=1e-5)
    assert abs(losses[1] - first) > 1e-4


def test_a_loss_of_this_package_trains_evaluates_and_resumes_with_its_statistics(tmp_path, inputs):
    options = {
        "pref_loss": "gamma-dpo",
        "pref_beta": 0.5,
        "fused_prefopt": {"loss_kwargs": {"queue_size": 32}, "log_tokens": True},
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_dataset": "pairs",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "do_eval": True,
    }
    whole = ours(tmp_path / "whole", inputs, **options)
    saved = [
        torch.load(tmp_path / "whole" / "out" / f"checkpoint-{step}" / "preference_loss.pt")
        for step in (2, 4)
    ]
    assert saved[0].keys() == saved[1].keys()
    assert any(not torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    start = str(tmp_path / "whole" / "out" / "checkpoint-2")
    resumed = ours(tmp_path / "resumed", inputs, **options, resume_from_checkpoint=start)
    torch.testing.assert_close(resumed.weights, whole.weights, **CLOSE)
    again = torch.load(tmp_path / "resumed" / "out" / "checkpoint-4" / "preference_loss.pt")
    torch.testing.assert_close(again, saved[1], equal_nan=True, **CLOSE)
    for name in ("margin/mean", "entropy", "logits/chosen", "eval_loss", "eval_rewards/accuracies"):
        assert whole.logged(name), name
    results = json.loads((tmp_path / "whole" / "out" / "all_results.json").read_text("utf-8"))
    assert results["eval_loss"] == pytest.approx(whole.logged("eval_loss")[-1], abs=1e-6)


def test_a_checkpoint_without_statistics_is_told(tmp_path, inputs):
    saved = own(tmp_path / "own", inputs, save_strategy="steps", save_steps=1).folder
    options = {"resume_from_checkpoint": str(saved / "checkpoint-1"), "pref_loss": "gamma-dpo"}
    # LLaMA-Factory's trainer silences every warning after its constructor.
    with pytest.warns(UserWarning, match="preference_loss.pt: not found, the statistics start"):
        ours(tmp_path / "ours", inputs, **options)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "not trained"])
def test_the_evaluation_is_that_of_llamafactory(trained, tmp_path, inputs):
    options = {"eval_dataset": "pairs", "do_eval": True, "do_train": trained}
    # Without training the model is its own reference.
    options |= {} if trained else {"ref_model": None, "dataset": None}
    ours(tmp_path / "ours", inputs, **options)
    own(tmp_path / "own", inputs, **options)
    found, wanted = (
        json.loads((tmp_path / each / "out" / "eval_results.json").read_text("utf-8"))
        for each in ("ours", "own")
    )
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-5)
    names = [name for name in wanted if "rewards" in name or "logps" in name]
    assert len(names) == (6 if trained else 2)
    for name in names:
        assert found[name] == pytest.approx(wanted[name], abs=1e-4), name
    assert trained or not [name for name in found if "rewards" in name]


def test_the_router_of_experts_gets_no_loss_as_in_llamafactory(tmp_path, inputs, caplog):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=264, **sizes, **heads))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = {"model_name_or_path": str(tmp_path / "model"), "moe_aux_loss_coef": 0.5}
    options |= {"pref_loss": "simpo", "learning_rate": 0.1}
    mine = ours(tmp_path / "ours", inputs, **options)
    assert "output_router_logits: the router's loss is left out" in caplog.text
    torch.testing.assert_close(
        mine.weights, own(tmp_path / "own", inputs, **options).weights, **CLOSE
    )


def test_the_example_trains_with_a_model_of_this_disk(tmp_path, inputs):
    given = SETTINGS | inputs | {"dataset": "pairs", "output_dir": str(tmp_path), "max_samples": 8}
    del given["ref_model"]
    extra = ["fused_prefopt.loss_kwargs.alpha=0.25"]
    assert main(["llamafactory", "train", str(EXAMPLE), *words(given), *extra]) == 0
    run = Run(tmp_path)
    assert len(run.logged("loss")) == 2
    # Of the first step all rewards are 0.
    assert run.logged("margin/std")[1] > 0


def test_words_of_the_command_line_take_a_mapping_as_json(tmp_path, inputs):
    folder = tmp_path / "file"
    options = {"pref_loss": "alpha-dpo", "fused_prefopt": {"loss_kwargs": {"alpha": 0.3}}}
    from_file = ours(folder, inputs, **options)
    given = json.loads((folder / "train.yaml").read_text("utf-8"))
    given |= {
        "output_dir": str(tmp_path / "words"),
        "fused_prefopt": '{"loss_kwargs":{"alpha":0.3}}',
    }
    flags = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert main(["llamafactory", "train", *flags]) == 0
    torch.testing.assert_close(Run(tmp_path / "words").weights, from_file.weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pref_loss": "alfa-dpo"}, r"unknown loss 'alfa-dpo' \(did you mean 'alpha-dpo'"),
        ({"pref_loss": "kto_pair"}, r"unknown loss 'kto_pair' \(did you mean"),
        ({"pref_loss": "kto"}, "loss: 'kto' is point-wise, wanted one on pairs"),
        ({"stage": "kto", "pref_loss": "sigmoid"}, "'dpo' is pairwise, wanted one on points"),
        (
            {"pref_loss": "alpha-dpo", "pref_bco_weight": 0.5},
            "^pref_bco_weight: got 0.5 .* write a sum",
        ),
        ({"pref_bco_weight": -0.5}, "^pref_bco_weight: got -0.5, wanted"),
        ({"stage": "kto", "pref_ftx": 0.5}, "^pref_ftx: got 0.5 with the loss 'kto', needs 0.0: a"),
        ({"stage": "kto", "ld_alpha": 0.5}, "^ld_alpha: got 0.5 in stage 'kto', needs pairs"),
        ({"pref_loss": "hinge", "simpo_gamma": 0.9}, "^simpo_gamma: got 0.9 with the loss 'hinge'"),
        ({"pref_loss": "odpo"}, "odpo needs `rewards`"),
        ({"fused_prefopt": {"workspace": 1}}, r"got 'workspace' \(did you mean 'workspace_mb'"),
        ({"fused_prefopt": {"loss": "ipo"}, "pref_loss": "hinge"}, "^pref_loss: got 'hinge' and"),
        (
            {"pref_beta": 0.2, "fused_prefopt": {"loss_kwargs": {"beta": 0.3}}},
            "^pref_beta: got 0.2 and beta=0.3 in loss_kwargs, needs one of them",
        ),
        ({"stage": "sft", "fused_prefopt": {}}, "^fused_prefopt: got {} in stage 'sft', needs"),
        ({"stage": "rm", "pref_loss": "alpha-dpo"}, "^pref_loss: got 'alpha-dpo' in stage 'rm'"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(options, message, tmp_path, inputs):
    with pytest.raises((ValueError, TypeError), match=message):
        ours(tmp_path, inputs, **options)


def test_afterwards_llamafactory_is_its_own_again(tmp_path, inputs):
    with pytest.raises(ValueError, match="unknown loss"):
        ours(tmp_path, inputs, pref_loss="alfa-dpo")
    from llamafactory.train.dpo import trainer

    assert trainer.CustomDPOTrainer is CustomDPOTrainer
    assert parser._TRAIN_ARGS.count(FinetuningArguments) == 1
    assert launcher.__file__.endswith("launcher.py")
    # Its names, all of which are known here or refused; and no option that takes others.
    names = get_args(get_type_hints(FinetuningArguments)["pref_loss"])
    assert set(names) == {"sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"}


@pytest.mark.parametrize(
    "options",
    [
        {"pref_loss": "alpha-dpo"},
        {"stage": "kto", "finetuning_type": "lora", "lora_target": "all", "pref_beta": 0.5},
    ],
    ids=["alpha-dpo", "kto, lora"],
)
def test_several_processes_are_started_with_the_same_trainers(options, tmp_path, inputs):
    options = options | {"gradient_accumulation_steps": 1}
    alone = ours(tmp_path / "one", inputs, **options, per_device_train_batch_size=4)
    folder = tmp_path / "two"
    folder.mkdir()
    path = configured(folder, inputs, options)
    environment = os.environ | {
        "FORCE_TORCHRUN": "1",
        "NPROC_PER_NODE": "2",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(STAND_INS)]),
    }
    command = [sys.executable, "-m", "fused_prefopt", "llamafactory", "train", path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(Run(folder / "out").weights, alone.weights, **CLOSE)

"""Public doors that other libraries lack: where one opens, a trick of ours can go."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch.distributed as dist
from tiny_models import tiny_llama
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Trainer, TrainerCallback
from transformers.modeling_utils import PreTrainedModel

# What a callback of `transformers.Trainer` is told of.
EVENTS = {
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_substep_end",
    "on_step_end",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_log",
    "on_prediction_step",
    "on_push_begin",
}
# Methods of TRL's or transformers' trainers that ours stand for.
OVERRIDDEN = {
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_precompute_ref_logps",
    "_prepare_dataset",
    "_prepare_inputs",
    "_save_optimizer_and_scheduler",
    "_set_signature_columns_if_needed",
    "compute_loss",
    "compute_ref_log_probs",
    "evaluation_loop",
    "log",
    "prediction_step",
    "training_step",
}


def test_no_callback_meets_a_batch_a_loss_or_a_checkpoint_to_be_loaded():
    """Such events would stand for the class that `attach` gives a trainer."""
    assert {name for name in dir(TrainerCallback) if name.startswith("on_")} <= EVENTS


def test_no_callback_can_add_to_what_a_trainer_keeps_of_a_log(tmp_path):
    """If it could, `on_log` would stand for the `log` of that class."""
    from transformers import TrainingArguments

    class Adds(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs["added"] = 1.0

    args = TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True)
    trainer = Trainer(tiny_llama(), args, callbacks=[Adds()])
    trainer.log({"loss": 1.0})
    assert "added" not in trainer.state.log_history[-1]


def test_no_model_says_what_it_does_to_its_logits():
    """A method from hidden states to logits would stand for the names that its forward reads."""
    names = [name for name in dir(PreTrainedModel) if "logits" in name or name == "compute_loss"]
    assert not [name for name in names if not name.startswith("_")], names


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_trls_trainers_still_refuse_an_adapter_on_the_head(kind, tmp_path):
    """If they take it, or ask an option or a method of theirs, their module's name can stay."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from data_tokenizer import tiny_tokenizer
    from datasets import Dataset

    texts = {"prompt": ["the cat", "the mat"], "completion": [" sat", " on"]}
    pairs = {"prompt": texts["prompt"], "chosen": [" sat", " on"], "rejected": [" 1", " 2"]}
    rows = pairs if kind == "DPO" else texts | {"label": [True, False]}
    args = getattr(trl, f"{kind}Config")(output_dir=str(tmp_path), bf16=False, report_to="none")
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        getattr(trl, f"{kind}Trainer")(
            tiny_llama(),
            args=args,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tiny_tokenizer(),
            peft_config=peft.LoraConfig(target_modules=["lm_head"]),
        )


def test_trl_still_hashes_no_weights_that_ranks_share():
    """If it does, the name that stands in for its function can stay."""
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "hash_module"):
        pytest.skip("this TRL hashes no weights")
    layer = nn.Linear(2, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(layer.weight.data, DeviceMesh("cpu", [0]), [Shard(0)])
        layer.weight = nn.Parameter(weight)
        with pytest.raises(RuntimeError, match="numpy"):
            utils.hash_module(layer)
    finally:
        dist.destroy_process_group()


def test_trls_trainers_still_call_what_ours_override():
    """A method that TRL renames would be ours alone, and never called."""
    fused = pytest.importorskip("fused_prefopt.integrations.trl")
    for trainer in (fused.FusedDPOTrainer, fused.FusedKTOTrainer):
        ours = [each for each in trainer.__mro__ if each.__module__.startswith("fused_prefopt.")]
        theirs = {name for each in trainer.__mro__ if each not in ours for name in vars(each)}
        assert OVERRIDDEN - theirs == set(), trainer
        assert OVERRIDDEN <= {name for each in ours for name in vars(each)}, trainer


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_trls_trainers_still_compute_no_reference_of_images_ahead(kind, tmp_path):
    """If they do, the callback that lets them can go."""
    pytest.importorskip("trl")
    pytest.importorskip("PIL.Image")
    from tiny_images import image_trainer

    with pytest.raises(ValueError, match="not supported for vision datasets"):
        image_trainer(f"trl-{kind}", tmp_path, "llava", precompute_ref_log_probs=True)

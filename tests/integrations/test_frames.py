"""The way from a trainer's `compute_loss` to the first tile: few frames, and compiled once."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch

import fused_prefopt as fp

pytest.importorskip("transformers")

from tiny_models import pair_features, tiny_llama

from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import attach, past_wrappers
from fused_prefopt.ops.torch_engine import TorchEngine

PACKAGE = Path(fp.__file__).parent
# Frames of ours to `PreferenceLoss.forward`, without it, and to the engine, without that.
TO_THE_LOSS, TO_THE_ENGINE = 5, 12


def frames_of_a_step(folder, monkeypatch) -> list[traceback.FrameSummary]:
    """Frames of the package from `compute_loss` of TRL's fused trainer to the engine's first tile.

    The outermost first, without the engine's own.
    """
    trl = pytest.importorskip("fused_prefopt.integrations.trl")
    from data_tokenizer import tiny_tokenizer
    from datasets import Dataset

    stacks: list[traceback.StackSummary] = []
    for name in ("fold", "fold_and_keep"):
        own = getattr(TorchEngine, name)

        def fold(*args, own=own, **options):
            stacks.append(traceback.extract_stack())
            return own(*args, **options)

        monkeypatch.setattr(TorchEngine, name, fold)
    rows = {"prompt": ["the cat"] * 4, "chosen": [" sat on mat"] * 4, "rejected": [" on"] * 4}
    args = trl.FusedDPOConfig(
        output_dir=str(folder),
        loss="simpo",
        bf16=False,
        engine="torch",
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trl.FusedDPOTrainer(
        tiny_llama(),
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny_tokenizer(),
    ).train()
    ours = [frame for frame in stacks[0] if PACKAGE in Path(frame.filename).parents]
    start = next(i for i, frame in enumerate(ours) if frame.name == "compute_loss")
    return ours[start:]


def test_few_frames_lie_between_a_trainer_and_the_first_tile(tmp_path, monkeypatch):
    frames = frames_of_a_step(tmp_path, monkeypatch)
    way = [f"{Path(frame.filename).stem}.{frame.name}" for frame in frames]
    assert way[0] == "trainer_mixins.compute_loss"
    assert way.index("preference.forward") <= TO_THE_LOSS, way
    assert len(way) <= TO_THE_ENGINE, way


@pytest.mark.parametrize("arguments_of", [dict, past_wrappers])
def test_a_compiled_model_with_a_loss_is_compiled_once(arguments_of):
    torch.compiler.reset()
    model = tiny_llama()
    attachment = attach(model, fp.PreferenceLoss("alpha-dpo"))
    rows = [
        row | {"ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0} for row in pair_features(6)
    ]
    batch, compiled = PairCollator(0)(rows), torch.compile(model, backend="eager")
    wanted = model(**arguments_of(batch))["loss"]
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = compiled(**arguments_of(batch))["loss"]
        torch.testing.assert_close(loss, wanted)
        loss.backward()
    kept = attachment.pop_metrics("train")
    assert kept["rewards/margins"] == pytest.approx(
        kept["rewards/chosen"] - kept["rewards/rejected"]
    )
    torch.compiler.reset()

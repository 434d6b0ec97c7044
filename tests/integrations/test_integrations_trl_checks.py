"""What the trainers on top of TRL's make, and refuse, before they train."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from tiny_models import tiny_llama

pytest.importorskip("trl")
from datasets import IterableDataset  # noqa: E402
from test_integrations_points import LABELS, rows  # noqa: E402
from test_integrations_trl import dataset, options, trainer  # noqa: E402

from fused_prefopt.integrations.trl import (  # noqa: E402
    FusedDPOConfig,
    FusedDPOTrainer,
    FusedKTOConfig,
    FusedKTOTrainer,
)

KINDS = {
    "DPO": (FusedDPOTrainer, FusedDPOConfig, dataset),
    "KTO": (FusedKTOTrainer, FusedKTOConfig, rows),
}


@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_logits_are_refused_by_name_and_by_place(tmp_path, kind):
    make, config, data = KINDS[kind]
    wanted = "^compute_metrics: got a function of logits, needs None: .*; log_tokens=True logs"
    args = config(**options(tmp_path))
    with pytest.raises(ValueError, match=wanted):
        trainer(make, args, data(), compute_metrics=print)
    with pytest.raises(ValueError, match=wanted):
        make(tiny_llama(), None, args, None, data(), None, tiny_tokenizer(), print)
    with pytest.raises(TypeError, match="preprocess_logits_for_metrics"):
        trainer(make, args, data(), preprocess_logits_for_metrics=print)


@pytest.mark.parametrize("given", ["an object", "a name", "a name by place"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_configuration_is_named_after_the_model(tmp_path, monkeypatch, kind, given):
    make, config, data = KINDS[kind]

    @dataclass
    class OnCpu(config):
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
    more = {"train_dataset": data(), "processing_class": tiny_tokenizer()}
    places = (model, None, None) if given == "a name by place" else (model,)
    run = make(*places, **more)
    assert run.args.output_dir == f"tiny-{kind}"
    default = OnCpu(f"tiny-{kind}")
    assert type(run.args) is OnCpu
    for name in ("loss", "loss_kwargs", "beta", "on_nonfinite", "learning_rate", "max_length"):
        assert getattr(run.args, name) == getattr(default, name), name
    assert run.attachment.loss_fn.name == kind.lower()
    assert run.train_dataset.num_rows == 16


def spoiled(kind, column, value):
    """Sixteen rows, the sixth with `value` in `column`; a text in all of them."""
    numbers = [-1.0] * 16
    if kind == "DPO":
        other = column.replace("chosen", "rejected")
        return dataset(**{other: numbers, column: [*numbers[:5], value, *numbers[6:]]})
    columns = {"label": LABELS, "group": [0] * 16}
    good = LABELS if column == "label" else numbers
    if isinstance(value, str):
        good = [value] * 16
    elif column == "label":
        good = [int(each) for each in good]
    return rows(**columns | {column: [*good[:5], value, *good[6:]]})


NUMBERS = [
    ("DPO", "score_chosen", math.nan),
    ("DPO", "ref_chosen_logps", -math.inf),
    ("KTO", "reward", math.inf),
    ("KTO", "score", "good"),
    ("KTO", "ref_logps", math.nan),
]
LABELS_OF_NONE = [("KTO", "label", -1), ("KTO", "label", 2), ("KTO", "label", "false")]


def wanted_of(column, value, where):
    wanted = "true or false, or 1 or 0; map" if column == "label" else "a finite number; repair"
    return re.escape(f"{column}: got {value!r} in {where}, wanted {wanted}")


def row_of(value):
    return f"row {0 if isinstance(value, str) else 5} (counted from 0)"


@pytest.mark.parametrize(("kind", "column", "value"), NUMBERS + LABELS_OF_NONE)
def test_a_value_that_no_loss_can_take_is_refused_with_its_row(tmp_path, kind, column, value):
    make, config, data = KINDS[kind]
    bad, row = spoiled(kind, column, value), row_of(value)
    given = {"train_dataset": bad, "processing_class": tiny_tokenizer()}
    given["ref_model"] = tiny_llama(5)
    args = config(**options(tmp_path))
    wanted = wanted_of(column, value, f"{row} of train_dataset")
    with pytest.raises(ValueError, match=f"^{wanted}"):
        make(tiny_llama(), args=args, **given)
    given |= {"train_dataset": data(), "eval_dataset": {"hard": bad}}
    wanted = wanted_of(column, value, f"{row} of eval_dataset['hard']")
    with pytest.raises(ValueError, match=f"^{wanted}"):
        make(tiny_llama(), args=args, **given)


@pytest.mark.parametrize(("kind", "column", "value"), [NUMBERS[0], NUMBERS[2], LABELS_OF_NONE[0]])
def test_in_a_stream_it_is_refused_when_it_comes(tmp_path, kind, column, value):
    make, config, _ = KINDS[kind]
    bad = list(spoiled(kind, column, value))
    stream = IterableDataset.from_generator(lambda: iter(bad))
    args = config(**options(tmp_path, per_device_train_batch_size=8, max_steps=1))
    run = trainer(make, args, stream, ref_model=tiny_llama(5))
    with pytest.raises(ValueError, match=f"^{wanted_of(column, value, 'feature 5')}"):
        run.train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_that_gives_nan_is_refused_before_training(tmp_path, kind):
    make, config, data = KINDS[kind]
    reference = tiny_llama(5)
    torch.nn.init.constant_(reference.model.norm.weight, math.nan)
    args = config(**options(tmp_path, precompute_ref_log_probs=True))
    with pytest.raises(ValueError, match=r"^ref_\w+: got nan in row 0 .*of train_dataset"):
        trainer(make, args, data(), ref_model=reference)


def test_labels_of_one_and_zero_and_gaps_in_scores_are_taken(tmp_path):
    scores = [None, *[0.5] * 15]
    data = rows(label=[int(label) for label in LABELS], reward=scores)
    config = FusedKTOConfig(**options(tmp_path))
    run = trainer(FusedKTOTrainer, config, data, ref_model=tiny_llama(5))
    batch = run.data_collator([run.train_dataset[i] for i in range(3, 6)])
    assert batch["label"].tolist() == [0, 1, 1] and batch["rewards"].tolist() == [0.5] * 3


@pytest.mark.parametrize("loss", ["kto", "dro"])
def test_scores_are_logged_where_rows_bring_them(tmp_path, loss):
    config = FusedKTOConfig(**options(tmp_path, max_steps=2), loss=loss)
    scored = rows(label=LABELS, reward=[float(i) for i in range(16)])
    run = trainer(FusedKTOTrainer, config, rows(), eval_dataset=scored, ref_model=tiny_llama(5))
    run.train()
    run.evaluate()
    names = {name for row in run.state.log_history for name in row if "reward_model" in name}
    assert names == {"eval_reward_model/mean", "eval_reward_model/std"}
    assert run.state.log_history[-1]["eval_reward_model/mean"] == 7.5
    assert all("rewards/mean" in row for row in run.state.log_history[:2])

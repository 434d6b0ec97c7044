"""Steps whose loss or gradient is not finite: stopped at, skipped or taken, in every trainer."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import pair_features, tiny_llama
from trainers import (
    KINDS,
    arguments,
    assert_bit_equal,
    build,
    history,
    let_gradients_be_finite,
    spoil_losses,
    state_of,
)
from transformers import Trainer, TrainerCallback

import fused_prefopt as fp
from fused_prefopt.checks import ON_NONFINITE
from fused_prefopt.integrations import nonfinite
from fused_prefopt.integrations.transformers import attach

pytestmark = pytest.mark.slow
# Micro-batches are counted from 1; the third step has the fifth and the sixth.
BAD_STEP = 3
SETTINGS = {
    "max_steps": BAD_STEP,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
}


def run_of(kind, folder, on_nonfinite, **options):
    loss = "kto" if kind == "kto" else "alpha-dpo"
    return build(kind, folder, loss=loss, on_nonfinite=on_nonfinite, **SETTINGS | options)


def spoil_gradients(trainer, batches, value=math.inf):
    """One weight's gradient of these micro-batches, of a loss that stays finite."""
    seen = []

    def hook(gradient):
        seen.append(1)
        return gradient * value if len(seen) in batches else gradient

    return trainer.model.model.norm.weight.register_hook(hook)


def losses_of(trainer):
    return history(trainer, "loss")


def assert_finite_statistics(trainer):
    for name, value in trainer.attachment.loss_fn.state_dict().items():
        assert torch.as_tensor(value).isfinite().all(), name


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run without anything wrong, by kind and option, and its state after the second step."""
    runs = {}

    def run(kind, on_nonfinite="stop"):
        if (kind, on_nonfinite) not in runs:
            trainer = run_of(kind, tmp_path_factory.mktemp("clean"), on_nonfinite)
            states = []

            class Keeps(TrainerCallback):
                def on_step_end(self, *_, **__):
                    states.append(state_of(trainer))

            trainer.add_callback(Keeps())
            trainer.train()
            found = SimpleNamespace(trainer=trainer, states=states, losses=losses_of(trainer))
            runs[kind, on_nonfinite] = found
        return runs[kind, on_nonfinite]

    return run


# The loss of the first of two micro-batches alone; the gradient of the last.
CASES = [(spoil_losses, {5}), (spoil_gradients, {6})]


@pytest.mark.parametrize(("spoil", "batches"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_stops_before_a_weight_is_touched(tmp_path, clean, kind, spoil, batches):
    trainer = run_of(kind, tmp_path, "stop", save_strategy="steps", save_steps=1, max_steps=5)
    spoil(trainer, batches)
    of_loss = spoil is spoil_losses
    what = "loss of nan" if of_loss else r"gradient of (nan|inf) with a loss of \d+\.\d+"
    wanted = (
        rf"^step 3: got a {what}, needs finite numbers; the weights are those of step 2: look at"
        " the data and the learning rate, or set on_nonfinite='skip' or 'ignore'$"
    )
    with pytest.raises(FloatingPointError, match=wanted):
        trainer.train()
    assert trainer.state.global_step == 2
    assert_bit_equal(state_of(trainer), clean(kind).states[1])
    assert all(value.grad is None for value in trainer.model.parameters())
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    rows, losses = trainer.state.log_history, clean(kind).losses
    assert [row["loss"] for row in rows[:2]] == losses[:2]
    assert rows[2]["step"] == 3 and len(rows) == 3
    if of_loss:
        assert math.isnan(rows[2]["loss"])
    else:
        assert rows[2]["loss"] == pytest.approx(losses[2], rel=1e-6)
        assert not math.isfinite(rows[2]["grad_norm"])
    assert_finite_statistics(trainer)


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_steps_leave_weights_and_optimizer(tmp_path, clean, kind):
    trainer = run_of(kind, tmp_path, "skip", max_steps=4)
    spoil_losses(trainer, {5})
    spoil_gradients(trainer, {8})
    trainer.train()
    assert trainer.state.global_step == 4
    assert_bit_equal(state_of(trainer), clean(kind).states[1])
    rows = trainer.state.log_history
    assert [row.get("skipped_steps") for row in rows] == [None, None, 1, 2, 2]
    assert losses_of(trainer)[:2] == clean(kind).losses[:2]
    assert all(math.isfinite(loss) for loss in [*losses_of(trainer), rows[-1]["train_loss"]])
    assert_finite_statistics(trainer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clean_run_has_the_same_bits_whatever_the_option(clean, kind):
    runs = [clean(kind, option) for option in ON_NONFINITE]
    for run in runs:
        assert_bit_equal(run.states, runs[0].states)
        assert run.losses == runs[0].losses
        assert not history(run.trainer, "skipped_steps")
        assert not run.trainer.args.logging_nan_inf_filter


def micro_batch_losses(trainer):
    """What `compute_loss` returns in training, appended as it goes."""
    found, own = [], trainer.compute_loss

    def spy(*args, **kwargs):
        loss = own(*args, **kwargs)
        found.append(loss.item())
        return loss

    trainer.compute_loss = spy
    return found


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["transformers", "dpo"])
def test_the_logged_loss_of_skipped_steps_is_the_mean_of_the_finite_ones(tmp_path, kind, bad):
    # Eight micro-batches an epoch.
    options = {"max_steps": 6, "logging_steps": 2, "learning_rate": 1e-4, "max_grad_norm": 0.0}
    trainer = run_of(kind, tmp_path, "skip", **options)
    found = micro_batch_losses(trainer)
    own = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        own(*args, **kwargs) + (bad if len(found) in (2, 11, 12) else 0.0)
    )
    trainer.train()
    first = [found[0], *found[2:4]]
    wanted = [sum(first) / 3, sum(found[4:8]) / 4, sum(found[8:10]) / 2]
    assert losses_of(trainer) == pytest.approx(wanted, rel=1e-6)
    assert history(trainer, "skipped_steps") == [1, 1, 2, 2]
    finite = [*first, *found[4:10]]
    assert history(trainer, "train_loss") == pytest.approx([sum(finite) / 9], rel=1e-6)


def test_a_window_without_a_finite_loss_logs_nan_and_the_next_its_own(tmp_path):
    trainer = run_of("transformers", tmp_path, "skip")
    spoil_losses(trainer, {3, 4})
    trainer.train()
    assert [math.isnan(loss) for loss in losses_of(trainer)] == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_losses_are_logged_as_they_are_and_the_next_window_recovers(tmp_path, kind):
    trainer = run_of(kind, tmp_path, "ignore", max_steps=4, logging_steps=2)
    spoil_losses(trainer, {2})
    # The weights stay finite: only the log is looked at.
    let_gradients_be_finite(trainer.model)
    trainer.train()
    first, second = losses_of(trainer)
    assert math.isnan(first) and math.isfinite(second)
    assert math.isnan(history(trainer, "train_loss")[0])
    assert not history(trainer, "skipped_steps")


def test_an_ignored_step_is_taken(tmp_path):
    trainer = run_of("transformers", tmp_path, "ignore", max_steps=1)
    spoil_losses(trainer, {1})
    trainer.train()
    assert trainer.model.lm_head.weight.isnan().all()


def test_skipped_steps_are_counted_on_in_a_resumed_run(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    first = run_of("transformers", tmp_path, "skip", max_steps=2, **saved)
    spoil_losses(first, {1})
    first.train()
    again = run_of("transformers", tmp_path, "skip", max_steps=4)
    spoil_losses(again, {4})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rows = again.state.log_history
    assert [row.get("skipped_steps") for row in rows if "loss" in row] == [1, 1, 1, 2]
    again.train()
    assert not history(again, "skipped_steps")


@pytest.mark.parametrize("kind", ["transformers", "dpo"])
def test_training_starts_anew_after_a_stop(tmp_path, kind):
    trainer = run_of(kind, tmp_path, "stop")
    handle = spoil_losses(trainer, {2})
    with pytest.raises(FloatingPointError, match="step 1: .* those of step 0"):
        trainer.train()
    handle.remove()
    trainer.train()
    assert trainer.state.global_step == 3
    assert all(math.isfinite(loss) for loss in losses_of(trainer))
    # The metrics of the step that was not taken are not those of the first that is.
    assert history(trainer, "nonfinite") == [0, 0, 0]


def test_what_an_exception_leaves_behind_stops_no_later_training(tmp_path):
    class Interrupts(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = run_of("transformers", tmp_path, "stop", max_steps=1)
    handle = spoil_losses(trainer, {1})
    trainer.add_callback(Interrupts)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    trainer.remove_callback(Interrupts)
    trainer.train()
    assert math.isfinite(losses_of(trainer)[0])


def test_nan_of_the_backbone_is_logged_with_its_count(tmp_path):
    trainer = build("transformers", tmp_path, pair_features(8), loss="simpo")
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="step 1: got a loss of nan"):
        trainer.train()
    assert math.isnan(losses_of(trainer)[0]) and history(trainer, "nonfinite") == [4]


class LargeNumbers(torch.nn.Module):
    """Gradients of each kind: whole, empty, absent, of half precision."""

    def __init__(self):
        super().__init__()
        shapes = {"whole": 3, "empty": 0, "absent": 2, "narrow": 4}
        for name, size in shapes.items():
            dtype = torch.bfloat16 if name == "narrow" else torch.float32
            setattr(self, name, torch.nn.Parameter(torch.zeros(size, dtype=dtype)))
            if name != "absent":
                getattr(self, name).grad = torch.full((size,), 3e38, dtype=dtype)


def test_gradients_are_judged_by_their_entries():
    model = LargeNumbers()
    parameters = list(model.parameters())
    # Their norm overflows; none of them does.
    assert nonfinite._worst_gradient(parameters) == 0
    model.narrow.grad[1] = -math.inf
    assert nonfinite._worst_gradient(parameters) == math.inf
    model.whole.grad[2] = math.nan
    assert nonfinite._worst_gradient(parameters).isnan()
    assert nonfinite._worst_gradient([model.absent, model.empty]) == 0


def test_under_a_gradient_scaler_the_loss_alone_is_judged(tmp_path, clean):
    def scaled(on_nonfinite):
        """With fp16's scaler, which accelerate makes on a GPU alone."""
        trainer = run_of("transformers", tmp_path, on_nonfinite)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        return trainer

    wanted = clean("transformers").states[1]
    trainer = scaled("stop")
    spoil_gradients(trainer, {6})
    trainer.train()
    assert_bit_equal(state_of(trainer), wanted)
    trainer = scaled("stop")
    spoil_losses(trainer, {6})
    with pytest.raises(FloatingPointError, match="step 3: got a loss of nan"):
        trainer.train()
    assert_bit_equal(state_of(trainer), wanted)
    # The finite gradient of a skipped step is left out.
    trainer = scaled("skip")
    found, own = micro_batch_losses(trainer), trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        own(*args, **kwargs) + (math.nan if len(found) == 5 else 0.0)
    )
    trainer.train()
    assert_bit_equal(state_of(trainer), wanted)
    assert trainer.state.log_history[-1]["skipped_steps"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_backward_pass_is_the_step_the_loss_is_judged_before(
    tmp_path, clean, monkeypatch, kind
):
    trainer = run_of(kind, tmp_path, "stop")
    monkeypatch.setattr(nonfinite, "_steps_in_backward", lambda _: "a test")
    spoil_losses(trainer, {5})
    passes, own = [], trainer.accelerator.backward
    monkeypatch.setattr(
        trainer.accelerator, "backward", lambda *a, **k: passes.append(1) or own(*a, **k)
    )
    with pytest.raises(FloatingPointError, match="step 3: got a loss of nan"):
        trainer.train()
    assert len(passes) == 4
    assert math.isnan(losses_of(trainer)[2])
    assert_bit_equal(state_of(trainer), clean(kind).states[1])


def test_options_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="on_nonfinite: got 'skipp' .did you mean 'skip'"):
        run_of("transformers", tmp_path, "skipp")
    with pytest.raises(ValueError, match="on_nonfinite: got 'halt', wanted one of 'stop', 'skip'"):
        run_of("dpo", tmp_path, "halt")
    with pytest.raises(ValueError, match="on_nonfinite: got 'skip' with a model, needs the tr"):
        attach(tiny_llama(), fp.PreferenceLoss("simpo"), on_nonfinite="skip")
    trainer = Trainer(tiny_llama(), arguments(tmp_path))
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="on_nonfinite: got 'skip' with DeepSpeed, whose optim"):
        attach(trainer, fp.PreferenceLoss("simpo"), on_nonfinite="skip")
    with pytest.raises(ValueError, match="got 'skip' with optim='lomo', whose optimizer steps"):
        run_of("transformers", tmp_path, "skip", optim="lomo")

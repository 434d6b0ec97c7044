"""Steps whose loss or gradient is not finite: stopped at, skipped or taken, in every trainer."""

from __future__ import annotations

import gc
import math
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import pair_features, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import fused_prefopt as fp
from fused_prefopt.checks import ON_NONFINITE
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations import nonfinite
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach
from fused_prefopt.reference import add_reference_logps

# Micro-batches are counted from 1; the third step has the fifth and the sixth.
ACCUMULATION, BAD_STEP = 2, 3
SETTINGS = {
    "max_steps": BAD_STEP,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": ACCUMULATION,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def pairs():
    features = pair_features(16)
    return add_reference_logps(tiny_llama(7), features, PairCollator(0), progress=False)


def of_transformers(folder, on_nonfinite, *, attached=False, loss="alpha-dpo", **options):
    given = {"remove_unused_columns": False, "label_names": ["completion_mask"]}
    args = TrainingArguments(output_dir=str(folder), **SETTINGS | given | options)
    more = {"train_dataset": pairs(), "data_collator": PairCollator(0)}
    loss_fn = fp.PreferenceLoss(loss)
    if not attached:
        return PreferenceTrainer(
            tiny_llama(), args, loss_fn=loss_fn, on_nonfinite=on_nonfinite, **more
        )
    trainer = Trainer(tiny_llama(), args, **more)
    attach(trainer, loss_fn, on_nonfinite=on_nonfinite)
    return trainer


def attached(folder, on_nonfinite, **options):
    return of_transformers(folder, on_nonfinite, attached=True, **options)


def of_trl(folder, on_nonfinite, *, points=False, **options):
    pytest.importorskip("trl")
    from data_tokenizer import tiny_tokenizer
    from test_integrations_points import rows
    from test_integrations_trl import dataset

    from fused_prefopt.integrations import trl

    kind, config = trl.FusedDPOTrainer, trl.FusedDPOConfig
    if points:
        kind, config = trl.FusedKTOTrainer, trl.FusedKTOConfig
    given = SETTINGS | {"bf16": False, "gradient_checkpointing": False} | options
    given |= {} if points else {"loss": "alpha-dpo"}
    return kind(
        tiny_llama(),
        ref_model=tiny_llama(7),
        args=config(output_dir=str(folder), **given, on_nonfinite=on_nonfinite),
        train_dataset=rows() if points else dataset(16),
        processing_class=tiny_tokenizer(),
    )


def of_points(folder, on_nonfinite, **options):
    return of_trl(folder, on_nonfinite, points=True, **options)


KINDS = {
    "PreferenceTrainer": of_transformers,
    "attach": attached,
    "FusedDPOTrainer": of_trl,
    "FusedKTOTrainer": of_points,
}


def spoil_losses(trainer, batches, value=math.nan):
    """The policy's hidden states of these micro-batches times `value`."""
    seen = []

    def hook(module, _, output):
        if module.training and torch.is_grad_enabled():
            seen.append(1)
            if len(seen) in batches:
                output.last_hidden_state = output.last_hidden_state * value
        return output

    return trainer.model.model.register_forward_hook(hook)


def spoil_gradients(trainer, batches, value=math.inf):
    """One weight's gradient of these micro-batches, of a loss that stays finite."""
    seen = []

    def hook(gradient):
        seen.append(1)
        return gradient * value if len(seen) in batches else gradient

    return trainer.model.model.norm.weight.register_hook(hook)


def let_gradients_be_finite(model):
    for value in model.parameters():
        value.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))


def state_of(trainer):
    """Weights and optimizer state, by name."""
    state = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    for number, moments in trainer.optimizer.state_dict()["state"].items():
        state |= {f"{number} {name}": torch.as_tensor(value) for name, value in moments.items()}
    return state


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def losses_of(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run without anything wrong, by kind, option and steps; made once."""
    runs = {}

    def run(kind, on_nonfinite="stop", steps=BAD_STEP - 1):
        key = kind, on_nonfinite, steps
        if key not in runs:
            folder = tmp_path_factory.mktemp("clean")
            runs[key] = KINDS[kind](folder, on_nonfinite, max_steps=steps)
            runs[key].train()
        return runs[key]

    return run


# The loss of the first of two micro-batches alone; the gradient of the last.
CASES = [(spoil_losses, {5}), (spoil_gradients, {6})]


@pytest.mark.parametrize(("spoil", "batches"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_stops_before_a_weight_is_touched(tmp_path, clean, kind, spoil, batches):
    trainer = KINDS[kind](tmp_path, "stop", save_strategy="steps", save_steps=1, max_steps=5)
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
    assert_equal(state_of(trainer), state_of(clean(kind)))
    assert all(value.grad is None for value in trainer.model.parameters())
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    before, last = trainer.state.log_history[:2], trainer.state.log_history[2]
    assert [row["loss"] for row in before] == losses_of(clean(kind))
    assert last["step"] == 3 and len(trainer.state.log_history) == 3
    if of_loss:
        assert math.isnan(last["loss"])
    else:
        third = losses_of(clean(kind, steps=3))[2]
        assert last["loss"] == pytest.approx(third, rel=1e-6)
        assert not math.isfinite(last["grad_norm"])
    for name, value in trainer.attachment.loss_fn.state_dict().items():
        assert torch.as_tensor(value).isfinite().all(), name


@pytest.mark.parametrize(("spoil", "batches"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_leaves_weights_and_optimizer(tmp_path, clean, kind, spoil, batches):
    trainer = KINDS[kind](tmp_path, "skip")
    spoil(trainer, batches)
    trainer.train()
    assert trainer.state.global_step == BAD_STEP
    assert_equal(state_of(trainer), state_of(clean(kind)))
    rows = trainer.state.log_history
    assert [row.get("skipped_steps") for row in rows] == [None, None, 1, 1]
    assert losses_of(trainer)[:2] == losses_of(clean(kind))
    assert math.isfinite(losses_of(trainer)[2]) and math.isfinite(rows[3]["train_loss"])
    for name, value in trainer.attachment.loss_fn.state_dict().items():
        assert torch.as_tensor(value).isfinite().all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_clean_run_has_the_same_bits_whatever_the_option(clean, kind):
    runs = [clean(kind, option) for option in ON_NONFINITE]
    for other in runs[1:]:
        assert_equal(state_of(runs[0]), state_of(other))
        assert losses_of(runs[0]) == losses_of(other)
    assert all("skipped_steps" not in row for run in runs for row in run.state.log_history)
    assert not any(run.args.logging_nan_inf_filter for run in runs)


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
@pytest.mark.parametrize("kind", ["PreferenceTrainer", "FusedDPOTrainer"])
def test_the_logged_loss_of_skipped_steps_is_the_mean_of_the_finite_ones(tmp_path, kind, bad):
    # Five micro-batches of four pairs each epoch: the last step of two has one alone.
    trainer = KINDS[kind](
        tmp_path, "skip", max_steps=6, logging_steps=2, learning_rate=1e-4, max_grad_norm=0.0
    )
    found = micro_batch_losses(trainer)
    own = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        own(*args, **kwargs) + (bad if len(found) in (2, 11, 12) else 0.0)
    )
    trainer.train()
    logged = losses_of(trainer)
    first = [found[0], *found[2:4]]
    assert logged[0] == pytest.approx(sum(first) / 3, rel=1e-6)
    assert logged[1] == pytest.approx(sum(found[4:8]) / 4, rel=1e-6)
    assert logged[2] == pytest.approx(sum(found[8:10]) / 2, rel=1e-6)
    rows = trainer.state.log_history
    assert [row["skipped_steps"] for row in rows] == [1, 1, 2, 2]
    finite = [*first, *found[4:10]]
    assert rows[-1]["train_loss"] == pytest.approx(sum(finite) / 9, rel=1e-6)


def test_a_window_without_a_finite_loss_logs_nan_and_the_next_its_own(tmp_path):
    trainer = of_transformers(tmp_path, "skip")
    spoil_losses(trainer, {3, 4})
    trainer.train()
    one, two, three = losses_of(trainer)
    assert math.isnan(two) and math.isfinite(one) and math.isfinite(three)


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_losses_are_logged_as_they_are_and_the_next_window_recovers(tmp_path, kind):
    trainer = KINDS[kind](tmp_path, "ignore", max_steps=4, logging_steps=2)
    spoil_losses(trainer, {2})
    # The weights stay finite: only the log is looked at.
    let_gradients_be_finite(trainer.model)
    trainer.train()
    first, second = losses_of(trainer)
    assert math.isnan(first) and math.isfinite(second)
    last = trainer.state.log_history[-1]
    assert math.isnan(last["train_loss"]) and "skipped_steps" not in last


def test_an_ignored_step_is_taken(tmp_path):
    trainer = of_transformers(tmp_path, "ignore", max_steps=1)
    spoil_losses(trainer, {1})
    trainer.train()
    assert trainer.model.lm_head.weight.isnan().all()


def test_skipped_steps_are_counted_on_in_a_resumed_run(tmp_path):
    first = of_transformers(tmp_path, "skip", max_steps=2, save_strategy="steps", save_steps=2)
    spoil_losses(first, {1})
    first.train()
    again = of_transformers(tmp_path, "skip", max_steps=4)
    spoil_losses(again, {4})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rows = again.state.log_history
    assert [row.get("skipped_steps") for row in rows if "loss" in row] == [1, 1, 1, 2]
    again.train()
    assert all("skipped_steps" not in row for row in again.state.log_history)


@pytest.mark.parametrize("kind", ["PreferenceTrainer", "FusedDPOTrainer"])
def test_training_starts_anew_after_a_stop(tmp_path, kind):
    trainer = KINDS[kind](tmp_path, "stop")
    handle = spoil_losses(trainer, {2})
    with pytest.raises(FloatingPointError, match="step 1: .* those of step 0"):
        trainer.train()
    handle.remove()
    trainer.train()
    assert trainer.state.global_step == 3
    assert all(math.isfinite(loss) for loss in losses_of(trainer))
    # The metrics of the step that was not taken are not those of the first that is.
    assert [row["nonfinite"] for row in trainer.state.log_history[:3]] == [0, 0, 0]


def test_what_an_exception_leaves_behind_stops_no_later_training(tmp_path):
    class Interrupts(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = of_transformers(tmp_path, "stop", max_steps=1)
    handle = spoil_losses(trainer, {1})
    trainer.add_callback(Interrupts)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    trainer.remove_callback(Interrupts)
    trainer.train()
    assert math.isfinite(losses_of(trainer)[0])


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


def scaled(trainer, scale=1.0):
    """The trainer with fp16's scaler, which accelerate makes on a GPU alone."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def test_under_a_gradient_scaler_the_loss_alone_is_judged(tmp_path, clean):
    trainer = scaled(of_transformers(tmp_path / "gradient", "stop"))
    spoil_gradients(trainer, {6})
    trainer.train()
    assert_equal(state_of(trainer), state_of(clean("PreferenceTrainer")))
    trainer = scaled(of_transformers(tmp_path / "loss", "stop"))
    spoil_losses(trainer, {6})
    with pytest.raises(FloatingPointError, match="step 3: got a loss of nan"):
        trainer.train()
    assert_equal(state_of(trainer), state_of(clean("PreferenceTrainer")))


def test_under_a_gradient_scaler_a_finite_gradient_of_a_skipped_step_is_left_out(tmp_path, clean):
    trainer = scaled(of_transformers(tmp_path, "skip"))
    own = trainer.compute_loss
    seen = []

    def compute_loss(*args, **kwargs):
        seen.append(1)
        return own(*args, **kwargs) + (math.nan if len(seen) == 5 else 0.0)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert_equal(state_of(trainer), state_of(clean("PreferenceTrainer")))
    assert trainer.state.log_history[-1]["skipped_steps"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_backward_pass_is_the_step_the_loss_is_judged_before(
    tmp_path, clean, monkeypatch, kind
):
    trainer = KINDS[kind](tmp_path, "stop")
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
    assert_equal(state_of(trainer), state_of(clean(kind)))


def test_options_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="on_nonfinite: got 'skipp' .did you mean 'skip'"):
        of_transformers(tmp_path, "skipp")
    with pytest.raises(ValueError, match="on_nonfinite: got 'skip' with a model, needs the tr"):
        attach(tiny_llama(), fp.PreferenceLoss("simpo"), on_nonfinite="skip")
    trainer = Trainer(
        tiny_llama(),
        TrainingArguments(
            output_dir=str(tmp_path),
            remove_unused_columns=False,
            label_names=["completion_mask"],
            use_cpu=True,
        ),
    )
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="on_nonfinite: got 'skip' with DeepSpeed, whose optim"):
        attach(trainer, fp.PreferenceLoss("simpo"), on_nonfinite="skip")
    with pytest.raises(ValueError, match="got 'skip' with optim='lomo', whose optimizer steps"):
        of_transformers(tmp_path, "skip", optim="lomo")


def test_trls_trainers_refuse_another_word(tmp_path):
    with pytest.raises(ValueError, match="on_nonfinite: got 'halt', wanted one of 'stop', 'skip'"):
        of_trl(tmp_path, "halt")


def _work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    results = {}
    for option, steps in (("stop", 3), ("skip", 3), ("ignore", 3), ("clean", 2)):
        trainer = of_transformers(
            folder, "stop" if option == "clean" else option, max_steps=steps, ddp_backend="gloo"
        )
        # One rank alone has the loss, and no rank its gradient.
        let_gradients_be_finite(trainer.model)
        if rank == 1 and option != "clean":
            spoil_losses(trainer, {5})
        raised = None
        try:
            trainer.train()
        except FloatingPointError as error:
            raised = str(error)
        rows = trainer.state.log_history
        results[option] = {"raised": raised, "rows": rows, "state": state_of(trainer)}
        del trainer
    mesh = init_device_mesh("cpu", (2,))
    sharded = torch.nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    values = torch.tensor([1.0, 2.0, 3.0, math.inf])
    sharded.grad = distribute_tensor(values, mesh, [Shard(0)])
    results["shard"] = nonfinite._worst_gradient([sharded]).item()
    torch.save(results, f"{folder}/{rank}.pt")
    # A DDP model that outlives its process group may wait for the other rank for ever.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_do_what_one_ranks_loss_asks_for(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    mp.spawn(_work, args=(port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    # Each rank looks at its own shard; the sum over the ranks tells the others.
    assert [results.pop("shard") for results in ranks] == [0, math.inf]
    for results in ranks:
        assert results["stop"]["raised"].startswith("step 3: got a loss of nan, needs")
        for option in ("stop", "skip"):
            assert_equal(results[option]["state"], results["clean"]["state"])
            assert_equal(results[option]["state"], ranks[0]["clean"]["state"])
        losses = {name: [row.get("loss") for row in results[name]["rows"]] for name in results}
        assert losses["stop"][:2] == losses["skip"][:2] == losses["clean"][:2]
        assert math.isnan(losses["stop"][2]) and math.isnan(losses["ignore"][2])
        assert math.isfinite(losses["skip"][2])
        assert results["skip"]["rows"][2]["skipped_steps"] == 1

"""Tiny trainers of every kind by one call, their data, and what is compared of their runs.

TRL's are imported where they are asked for: without TRL the others work.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_tokenizer import WORDS, tiny_tokenizer
from processes import start
from tiny_models import pair_features, tiny_llama
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach
from fused_prefopt.reference import add_reference_logps

ROOT = Path(__file__).resolve().parents[2]
# `PreferenceTrainer`, `attach` to transformers' own trainer, and the two on top of TRL's.
KINDS = ("transformers", "attached", "dpo", "kto")
OF_TRL = ("dpo", "kto")
TEXT = WORDS[6:]
# The first batch of four has no desirable completion, the second no other.
LABELS = [False] * 4 + [True] * 4 + [True, False, False, True] * 2
# What no two runs have in common.
TIMES = {"epoch", "step", "total_flos", "train_runtime", "train_loss", "learning_rate"} | {
    f"{mode}_{name}"
    for mode in ("train", "eval")
    for name in ("runtime", "samples_per_second", "steps_per_second")
}
SETTINGS = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
OF_TRANSFORMERS = {"remove_unused_columns": False, "label_names": ["completion_mask"]}
TRLS_DEFAULTS_OFF = {"bf16": False, "gradient_checkpointing": False}


def pairs_with_reference(count: int = 8) -> list[dict[str, Any]]:
    """Pairs of token ids with log-probs under another model."""
    return add_reference_logps(tiny_llama(7), pair_features(count), PairCollator(0), progress=False)


def dataset(rows: list[dict[str, Any]]) -> Any:
    """Rows as TRL takes them."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return Dataset.from_list(rows)


def pairs(count: int = 16, **columns: list[Any]) -> Any:
    """A data set of text: prompt, chosen, rejected, and these columns."""
    return _texts(0, count, columns, chosen=(1, 6), rejected=(1, 6))


def points(count: int = 16, **columns: list[Any]) -> Any:
    """A data set of text: prompt, completion, and these columns, without any a label."""
    return _texts(1, count, columns or {"label": LABELS}, completion=(1, 6))


def _texts(seed: int, count: int, columns: dict[str, Any], **sides: tuple[int, int]) -> Any:
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choice(TEXT) for _ in range(draw.randint(low, high)))

    rows = [
        {"prompt": words(2, 5)} | {name: f" {words(*size)}" for name, size in sides.items()}
        for _ in range(count)
    ]
    for index, row in enumerate(rows):
        row |= {name: values[index] for name, values in columns.items()}
    return dataset(rows)


DATA: dict[str, Callable[..., Any]] = {"dpo": pairs, "kto": points}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """transformers' configuration."""
    return TrainingArguments(output_dir=str(folder), **SETTINGS | OF_TRANSFORMERS | changes)


def trl_classes(kind: str) -> tuple[Any, Any]:
    """Trainer and configuration: "dpo" and "kto" are ours, "trl-dpo" and "trl-kto" TRL's own."""
    trl = pytest.importorskip("trl")
    name, source = f"Fused{kind.upper()}", pytest.importorskip("fused_prefopt.integrations.trl")
    if kind.startswith("trl-"):
        name, source = kind.removeprefix("trl-").upper(), trl
    return getattr(source, f"{name}Trainer"), getattr(source, f"{name}Config")


def config(kind: str, folder: Path, **changes: Any) -> Any:
    """The configuration of a trainer on top of TRL's, or of TRL's own."""
    return trl_classes(kind)[1](output_dir=str(folder), **SETTINGS | TRLS_DEFAULTS_OFF | changes)


def build(
    kind: str,
    folder: Path,
    data: Any = None,
    *,
    model: Any = None,
    reference: Any = None,
    loss: str | fp.PreferenceLoss | None = None,
    loss_kwargs: dict[str, Any] | None = None,
    on_nonfinite: str = "stop",
    log_tokens: bool = False,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer of a tiny Llama on sixteen rows.

    Args:
        kind: of `KINDS`, or "trl-dpo" or "trl-kto" for TRL's own.
        data: its data set.
        reference: a model, or "adapter". Default: of transformers' the data's own columns, of
            TRL's another model, where the loss wants one that nothing else gives.
        loss: a name; of transformers' the loss itself too.
        given: more arguments of the trainer.
        options: of the configuration.
    """
    loss = loss or ("kto" if kind.endswith("kto") else "dpo")
    model, given = model or tiny_llama(), given or {}
    if kind in ("transformers", "attached"):
        own = {"on_nonfinite": on_nonfinite, "log_tokens": log_tokens}
        own |= {"reference": "precomputed" if reference is None else reference}
        if isinstance(loss, str):
            loss = fp.PreferenceLoss(loss, **loss_kwargs or {})
        own["loss_fn"] = loss
        if data is None:
            data = pair_features(16) if reference is not None else pairs_with_reference(16)
        given = {"args": arguments(folder, **options), "train_dataset": data} | given
        if kind == "transformers":
            return PreferenceTrainer(model, **given | own)
        trainer = Trainer(model, **{"data_collator": PairCollator(0)} | given)
        attach(trainer, **own)
        return trainer
    trainer, _ = trl_classes(kind)
    if not kind.startswith("trl-"):
        own = {"loss": loss, "loss_kwargs": loss_kwargs or {}, "on_nonfinite": on_nonfinite}
        options = own | {"log_tokens": log_tokens} | options
    elsewhere = options.get("precompute_ref_log_probs") or given.get("peft_config")
    if reference is None and not elsewhere and not hasattr(model, "peft_config"):
        needed = "reference" in fp.PreferenceLoss(loss, **loss_kwargs or {}).loss.needs
        reference = tiny_llama(5) if needed else None
    return trainer(
        model,
        ref_model=reference,
        args=config(kind, folder, **options),
        train_dataset=DATA[kind.removeprefix("trl-")]() if data is None else data,
        processing_class=tiny_tokenizer(),
        **given,
    )


def held_out(kind: str) -> Any:
    """Ten rows for evaluation, whose batches are of 4, 4 and 2."""
    return points(10, label=[True, False] * 5) if kind.endswith("kto") else pairs(10)


def beside(
    kind: str, folder: Path, make: Callable[[], dict[str, Any]] | None = None, **options: Any
) -> list[Any]:
    """TRL's own trainer and ours on the same data, trained.

    `make` gives each what is its own: models, adapters. `loss` is an option of ours, and beside it
    `loss_type` one of theirs.
    """
    runs = []
    for each, left_out in (
        (f"trl-{kind}", "loss"),
        (kind, "loss_type" if "loss" in options else ""),
    ):
        torch.manual_seed(0)
        own = {name: value for name, value in options.items() if name != left_out}
        own |= make() if make else {}
        run = build(each, folder, log_tokens=each == kind, **own)
        # That is KTO's default, which transformers before 5.2 does not read.
        runs.append(in_order(run) if kind == "kto" else run)
        runs[-1].train()
    return runs


def lora(seed: int = 0, model: Any = None, **options: Any) -> Any:
    """A tiny model, or this one, with an adapter whose terms are not zero."""
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.2}
    model = peft.get_peft_model(model or tiny_llama(), peft.LoraConfig(**settings | options))
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    return model


def in_order(run: Any) -> Any:
    """The trainer, whose batches are now the data set's rows in order."""
    run._get_train_sampler = lambda *_: SequentialSampler(run.train_dataset)
    return run


def first_batch(run: Any) -> dict[str, Any]:
    """What the first step is given."""
    return next(iter(run.get_train_dataloader()))


def history(run: Any, name: str) -> list[float]:
    """What was logged by this name, in order."""
    return [row[name] for row in run.state.log_history if name in row]


def assert_same_logs(theirs: Any, ours: Any, *, tolerance: float = 1e-4, ties: int = 0) -> set[str]:
    """Everything that one run logs, the other logs with the same values.

    In the first `ties` steps rounding decides the accuracies. Returns the names.
    """
    names = {name for row in theirs.state.log_history for name in row} - TIMES
    for name in names:
        one, other = history(theirs, name), history(ours, name)
        assert len(other) == len(one), name
        if name == "rewards/accuracies":
            one, other = one[ties:], other[ties:]
        assert other == pytest.approx(one, rel=1e-4, abs=tolerance), name
    return names


class Killed(Exception):
    """Stands for whatever ends a run."""


def spoil_losses(trainer: Any, batches: set[int], value: float = float("nan")) -> Any:
    """The policy's hidden states of these micro-batches (from 1) times `value`."""
    seen = []

    def hook(module: Any, _: Any, output: Any) -> Any:
        if module.training and torch.is_grad_enabled():
            seen.append(1)
            if len(seen) in batches:
                output.last_hidden_state = output.last_hidden_state * value
        return output

    return trainer.model.model.register_forward_hook(hook)


def let_gradients_be_finite(model: torch.nn.Module) -> None:
    """Only the loss is not."""
    for value in model.parameters():
        value.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Weights and optimizer state, by name."""
    state = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    for number, moments in trainer.optimizer.state_dict()["state"].items():
        values = {name: torch.as_tensor(value).clone() for name, value in moments.items()}
        state |= {f"{number} {name}": value for name, value in values.items()}
    return state


def assert_bit_equal(one: Any, other: Any, where: str = "") -> None:
    """Nested dictionaries and lists of tensors and values, with NaN equal to NaN."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_bit_equal(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_bit_equal(*pair, f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=where)
    else:
        # NaN alone is not itself.
        assert one == other or (one != one and other != other), where


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a Python that imports this package, on one core."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def spawned(work: Callable[..., None], folder: Path) -> list[Any]:
    """What each of two processes leaves in ``<rank>.pt``; `work` takes rank, port and folder."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    start(work, 2, port, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]

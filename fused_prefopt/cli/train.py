"""`train`: one training from a YAML file, with any loss, and what comes of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fused_prefopt.cli.config import Config, add_config_arguments, read_config
from fused_prefopt.cli.console import UserError, blaming, require_packages
from fused_prefopt.cli.models import training_autocast, with_adapters
from fused_prefopt.cli.reference import reference_for_columns, with_reference
from fused_prefopt.cli.report import comparison_table, write_report
from fused_prefopt.cli.runs import (
    EVALUATION,
    Beginning,
    find_beginning,
    how_to_continue,
    load_trained,
    read_runs,
)
from fused_prefopt.cli.task import Features, Task, load_task
from fused_prefopt.data.columns import REFERENCE
from fused_prefopt.integrations.trainer_mixins import LOSS_STATE
from fused_prefopt.losses.metrics import NONFINITE, REWARDS_ACCURACIES, REWARDS_MARGINS

HELP = "train a model on preferences, as a YAML file says"
CONFIG = "config.yaml"
# Name in the line → what the trainer logged, and its format.
_COLUMNS = {
    "loss": ("loss", "7.4f"),
    "accuracy": (REWARDS_ACCURACIES, "5.3f"),
    "margin": (REWARDS_MARGINS, "8.4f"),
}
_LEARNING_RATE, _BAD = "learning_rate", NONFINITE
_EVALUATED = "eval_"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config_arguments(parser)
    parser.usage = f"{parser.prog} [-h] CONFIG [--resume] [KEY=VALUE …]"
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in output_dir, if there is one; a run that has"
        " ended is left as it is",
    )


def run(options: argparse.Namespace) -> int:
    """Train, judge, and write it all to `output_dir`.

    There: `config.yaml`, before anything is computed; then the model and tokenizer, the loss's
    statistics, numbers on held-out pairs (`evaluation.json`), the trainer's `trainer_state.json`,
    by which a run is known that has ended, and the pictures of `report`.

    Returns:
        0; 1 where a loss or gradient that is not finite stopped the training, 130 where the user
        did.

    Raises:
        UserError: the configuration or something it names does not fit, or `output_dir` has an
            earlier run and `--resume` is not given.
    """
    config = read_config(options.config, options.overrides)
    beginning = find_beginning(config, options.resume)
    if beginning.finished is not None:
        print(f"already finished at step {beginning.finished}", flush=True)
        return 0
    if options.resume:
        checkpoint = beginning.checkpoint
        whence = "no checkpoint, from the start" if checkpoint is None else f"from {checkpoint}"
        print(f"resuming {whence}", flush=True)
    _check_folder(config)
    if config.settings.pictures:
        require_packages("pictures", "matplotlib")
    task = load_task(config)
    _write_config(config)
    held_out = _add_reference_columns(task)
    trainer = _trainer(task)
    status = _train(trainer, config, beginning)
    if status:
        return status
    trainer.save_model(str(config.folder))
    if trainer.is_world_process_zero():
        _write_loss_and_judge(task, trainer, held_out)
    trainer.accelerator.wait_for_everyone()
    trainer.save_state()
    if trainer.is_world_process_zero():
        if config.settings.pictures:
            write_report(read_runs([str(config.folder)]), config.folder / "report")
        print(f"model, log and evaluation are in {config.folder}", flush=True)
    trainer.accelerator.wait_for_everyone()
    return 0


def step_line(logs: Mapping[str, Any], step: int) -> str:
    """A trainer's log as a line: of a training step, an evaluation or the end.

    Args:
        logs: what the trainer logs; anything else than those three is returned as it is.
        step: the optimizer's.
    """
    if "train_runtime" in logs:
        return f"trained to step {step} in {logs['train_runtime']:.1f} s"
    of_evaluation = f"{_EVALUATED}loss" in logs
    if not of_evaluation and "loss" not in logs:
        return str(dict(logs))
    prefix = _EVALUATED if of_evaluation else ""
    words = ["held out " if of_evaluation else f"step {step:4d}"]
    for name, (metric, layout) in _COLUMNS.items():
        if prefix + metric in logs:
            words.append(f"{name} {float(logs[prefix + metric]):{layout}}")
    if _LEARNING_RATE in logs:
        words.append(f"lr {float(logs[_LEARNING_RATE]):.2e}")
    if logs.get(_BAD):
        words.append(f"{_BAD} {logs[_BAD]:g}")
    return "  ".join(words)


def shorten_step_lines(trainer: Any) -> None:
    """Let a trainer print `step_line` instead of all that it logs.

    Args:
        trainer: `transformers.Trainer`; it keeps its progress bar.
    """
    from tqdm.auto import tqdm
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class StepLines(TrainerCallback):
        """Prints each log as a line, above the bar."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if state.is_world_process_zero and logs:
                tqdm.write(step_line(logs, state.global_step))

    class Bar(ProgressCallback):
        """The progress bar without the log."""

        def on_log(self, *_: Any, **__: Any) -> None:
            pass

    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Bar)
    trainer.add_callback(StepLines)


def _train(trainer: Any, config: Config, beginning: Beginning) -> int:
    """The training itself; returns the status to exit with where it ended early, else 0."""
    checkpoint = beginning.checkpoint
    try:
        if checkpoint is not None and beginning.is_trained:
            print("nothing is left to train", flush=True)
            load_trained(trainer, checkpoint)
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except FloatingPointError as error:
        _say_why_it_ended(f"{error}; {how_to_continue(config)}")
        return 1
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            step = trainer.state.global_step
            _say_why_it_ended(f"interrupted at step {step}; {how_to_continue(config)}")
        return 130
    return 0


def _say_why_it_ended(message: str) -> None:
    # A progress bar has not ended its line.
    begin = "\n" if sys.stderr.isatty() else ""
    print(f"{begin}fused-prefopt: {message}", file=sys.stderr, flush=True)


def _check_folder(config: Config) -> None:
    """Raise where nothing could be written at the end."""
    folder = config.folder.absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise UserError(f"output_dir: got {config.folder}, but {there} is a file; needs a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: got {config.folder}, but {there} cannot be written to")


def _write_config(config: Config) -> None:
    """Every key as it was given, for whoever finds the folder of a run that was killed."""
    from omegaconf import OmegaConf

    if not config.training.should_save:
        return
    given = OmegaConf.create(config.given | {"output_dir": str(config.folder)})
    with blaming("output_dir"):
        config.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(given, config.folder / CONFIG)


def _add_reference_columns(task: Task) -> Features:
    """Put the reference's columns where they are wanted; returns the held-out pairs with theirs."""
    settings = task.config.settings
    wanted = settings.reference == "precomputed" and REFERENCE in task.loss_fn.loss.needs
    if not (wanted or task.held_out):
        return []
    model = reference_for_columns(task)
    if wanted:
        task.train = with_reference(task, model, task.train)
        if _evaluates(task):
            task.evaluated = with_reference(task, model, task.evaluated)
    return with_reference(task, model, task.held_out) if task.held_out else []


def _evaluates(task: Task) -> bool:
    """Whether the trainer judges held-out features while it trains."""
    return bool(task.evaluated) and task.config.training.eval_strategy != "no"


def _trainer(task: Task) -> Any:
    from fused_prefopt.integrations.transformers import PreferenceTrainer

    settings, training = task.config.settings, task.config.training
    model = task.model
    if settings.peft is not None:
        with blaming("peft"):
            model = with_adapters(model, settings.peft, training.seed)
    reference: nn.Module | str = settings.reference
    if reference == "model":
        needed = REFERENCE in task.loss_fn.loss.needs
        reference = task.reference_model() if needed else "precomputed"
    with blaming("layout"):
        collator = task.collator(settings.layout)
    try:
        trainer = PreferenceTrainer(
            model,
            training,
            loss_fn=task.loss_fn,
            reference=reference,
            log_tokens=settings.log_tokens,
            on_nonfinite=settings.on_nonfinite,
            train_dataset=task.train,
            eval_dataset=task.evaluated if _evaluates(task) else None,
            data_collator=collator,
            processing_class=task.tokenizer,
        )
    except (ValueError, ImportError) as error:
        # Of any key: the message itself says which.
        raise UserError(str(error)) from error
    with blaming("optim"):
        trainer.get_optimizer_cls_and_kwargs(training, trainer.model)
    if sys.stdout.isatty():
        shorten_step_lines(trainer)
    return trainer


def _write_loss_and_judge(task: Task, trainer: Any, held_out: Features) -> None:
    """The loss's statistics, and what held-out pairs say."""
    torch.save(task.loss_fn.state_dict(), task.config.folder / LOSS_STATE)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if held_out and sharded:
        print("held-out pairs are not judged: the model is sharded", flush=True)
    elif held_out:
        _judge(task, trainer, held_out)


def _judge(task: Task, trainer: Any, held_out: Features) -> None:
    """Print and write what held-out pairs say of the model and of its reference."""
    from fused_prefopt.data import PairCollator
    from fused_prefopt.evaluation import score_pairs

    source = trainer.attachment.reference
    kept = task.config.settings.reference == "model" and source is not None
    reference = source.model if kept else task.reference_model()
    with training_autocast(task.config.training):
        scores = score_pairs(
            trainer.accelerator.unwrap_model(trainer.model).eval(),
            reference,
            held_out,
            PairCollator(task.tokenizer.pad_token_id),
            batch_size=task.config.settings.reference_batch_size,
            progress=not task.config.training.disable_tqdm,
        )
    anchor = scores.batch.reference
    assert anchor is not None
    own = replace(scores.batch, policy=anchor)
    summaries = {
        "reference": replace(scores, batch=own, kl=0.0, kl_rejected=0.0).summary(),
        "trained": scores.summary(task.loss_fn.loss.reward),
    }
    print(f"\nheld-out pairs: {len(held_out)}\n\n{comparison_table(summaries)}\n", flush=True)
    text = json.dumps({"pairs": len(held_out), **summaries}, indent=1) + "\n"
    (task.config.folder / EVALUATION).write_text(text, encoding="utf-8")

"""`reference`: the reference model's log-probs of a configuration's data, computed and cached."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from fused_prefopt.cli.config import add_config_arguments, read_config
from fused_prefopt.cli.console import UserError
from fused_prefopt.cli.models import training_autocast
from fused_prefopt.cli.task import Features, Task, load_task
from fused_prefopt.data import PairCollator
from fused_prefopt.data.columns import (
    CHOSEN_IDS,
    PAIR_REFERENCES,
    REF_CHOSEN_LOGPS,
    REFERENCE,
    REFERENCES,
)

HELP = "compute and cache the reference log-probs that a training will need"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Fill the cache; the next `train` of the same configuration reads it.

    A run that was killed is continued by the next.

    Raises:
        UserError: the configuration or something it names does not fit.
    """
    task = load_task(read_config(options.config, options.overrides))
    model = reference_for_columns(task)
    train = with_reference(task, model, task.train)
    print(f"train: {len(train)} {_means(train)}")
    if task.held_out:
        held_out = with_reference(task, model, task.held_out)
        print(f"held out: {len(held_out)} {_means(held_out)}")
    print(f"cached in {task.config.cache_dir}")
    return 0


def reference_for_columns(task: Task) -> nn.Module:
    """The model that columns of log-probs come from: the start of training unless another is named.

    It is on the device that trains.
    """
    if task.config.settings.reference_model is not None:
        return task.reference_model()
    return task.model.to(task.config.training.device)


def with_reference(task: Task, model: nn.Module, features: Features) -> Features:
    """Features with the reference's log-probs, from the cache or put there.

    They are of the precision of the training's own forward passes.

    Args:
        task: says where the cache is.
        model: the reference.
        features: of pairs, or of what the task trains on.

    Raises:
        UserError: a cache that lies there is damaged or cannot be written, or the model gives no
            finite log-probs of the features.
    """
    from fused_prefopt.reference import add_reference_logps

    settings, training = task.config.settings, task.config.training
    of_pairs = CHOSEN_IDS in features[0]
    collator = PairCollator(task.tokenizer.pad_token_id) if of_pairs else task.collator()
    try:
        with training_autocast(training):
            return add_reference_logps(
                model,
                features,
                collator,
                tokenizer=task.tokenizer,
                batch_size=settings.reference_batch_size,
                cache_dir=task.config.cache_dir,
                progress=not training.disable_tqdm,
            )
    except OSError as error:  # nothing else is read or written there
        raise UserError(f"cache_dir: {error}") from error
    except ValueError as error:
        subject, _, said = str(error).partition(": ")
        key = {"model": "reference_model" if settings.reference_model else "model"}
        key |= {"features": "dataset", "cache_file": "cache_dir"}
        if Path(subject).parent == task.config.cache_dir:
            raise UserError(f"cache_dir: {error}") from error
        if subject not in key:
            raise
        raise UserError(f"{key[subject]}: {said}") from error


def _means(features: Features) -> str:
    """How many nats the completions have on average."""
    if REFERENCES in features[0]:
        every = [value for feature in features for value in feature[REFERENCES]]
        return f"lists, completions of {sum(every) / len(every):.4f} nats on average"
    if REF_CHOSEN_LOGPS not in features[0]:
        return f"completions of {_mean(features, REFERENCE):.4f} nats on average"
    chosen, rejected = (_mean(features, column) for column in PAIR_REFERENCES)
    return f"pairs, chosen of {chosen:.4f} and rejected of {rejected:.4f} nats on average"


def _mean(features: Features, column: str) -> float:
    return sum(feature[column] for feature in features) / len(features)

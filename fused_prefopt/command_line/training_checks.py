"""Values of `transformers.TrainingArguments` that it takes, and no training can use."""

from __future__ import annotations

from typing import Any

from fused_prefopt.checks import require_choice, require_count, require_number

_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
_NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon")
_INTERVALS = ("logging", "eval", "save")


def check_training(training: Any) -> None:
    """Raise where a value would end the training later, or be taken for another.

    Args:
        training: `transformers.TrainingArguments`.

    Raises:
        ValueError: a value does not fit; the message begins with its key.
    """
    for name in _COUNTS:
        require_count(name, getattr(training, name), low=1)
    for name in ("dataloader_num_workers", "seed"):
        require_count(name, getattr(training, name), low=0)
    for name in _NOT_NEGATIVE:
        require_number(name, getattr(training, name), low=0)
    for name in ("adam_beta1", "adam_beta2"):
        require_number(name, getattr(training, name), low=0, high=1, below=True)
    for name in _INTERVALS:
        if getattr(training, f"{name}_strategy") == "steps":
            require_number(f"{name}_steps", getattr(training, f"{name}_steps"), low=0, above=True)
    # The trainer takes any that is not positive for "as many as the epochs have".
    if training.max_steps != -1 and training.max_steps < 1:
        raise ValueError(
            f"max_steps: got {training.max_steps}, wanted an integer >= 1; leave it out to train"
            " num_train_epochs"
        )
    if training.max_steps == -1:
        require_number("num_train_epochs", training.num_train_epochs, low=0, above=True)
    _check_report_to(training)


def _check_report_to(training: Any) -> None:
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in training.report_to:
        require_choice("report_to", name, (*INTEGRATION_TO_CALLBACK, "none", "all"))
        if name not in ("none", "all", *get_available_reporting_integrations()):
            raise ValueError(
                f"report_to: got {name!r}, which is not installed: pip install {name}, or leave it"
                " out"
            )

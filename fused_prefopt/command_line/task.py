"""What a configuration makes of its data set, model and loss before anything trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fused_prefopt.checks import require_choice, require_number, require_tokens
from fused_prefopt.command_line.config_file import Config
from fused_prefopt.command_line.errors import UserError, blaming, require_packages
from fused_prefopt.command_line.models import load_reference, load_start, load_tokenizer
from fused_prefopt.command_line.records import (
    as_judged,
    as_pairs,
    as_points,
    held_out_records,
    training_records,
)
from fused_prefopt.command_line.settings import EMBEDDED, Settings
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.data.tokenise import counted_pairs, counted_points
from fused_prefopt.fingerprint import TOKEN_COLUMNS
from fused_prefopt.integrations.causal_lm import input_vocab
from fused_prefopt.losses.needs import WHAT_IT_IS
from fused_prefopt.losses.protocol import Loss
from fused_prefopt.ops.engines import choose_engine
from fused_prefopt.ops.plan import PATHS
from fused_prefopt.preference import PreferenceLoss

Features = list[dict[str, Any]]
# Fields of a batch → columns of the features they are made of.
_PAIR_COLUMNS = {"rewards": ("score_chosen", "score_rejected")}
_POINT_COLUMNS = {"rewards": ("reward",), "desirable": ("desirable",), "groups": ("group",)}
# The training itself computes these.
_COMPUTED = frozenset({"reference", "prompt", "prompt_reference", "sequence_kl"})


@dataclass
class Task:
    """A loss, a tokenizer, a model and features.

    Attributes:
        config: where they come from.
        loss_fn: the loss.
        tokenizer: with a padding token.
        model: that training starts from.
        train: features of the kind that the loss judges.
        held_out: features of pairs to judge on.
        evaluated: the same of the kind that the loss judges.
    """

    config: Config
    loss_fn: PreferenceLoss
    tokenizer: Any
    model: nn.Module
    train: Features
    held_out: Features
    evaluated: Features

    @property
    def is_pairwise(self) -> bool:
        return self.loss_fn.loss.pairwise

    def collator(self, layout: str = "padded") -> PairCollator | PointCollator:
        """The collator of `train`, in one of the layouts of `Settings`.

        Raises:
            ValueError: prompts are to be shared by single completions.
        """
        pad, packed = self.tokenizer.pad_token_id, layout == "packed"
        if self.is_pairwise:
            return PairCollator(pad, padding_free=packed, shared_prompt=layout == "shared_prompt")
        if layout == "shared_prompt":
            raise ValueError(f"layout: got shared_prompt, and {self.loss_fn.name} judges no pairs")
        return PointCollator(pad, padding_free=packed)

    def reference_model(self) -> nn.Module:
        """A model of its own to compare with, on the device that trains."""
        settings, training = self.config.settings, self.config.training
        with blaming("reference_model"):
            model = load_reference(settings, self.tokenizer, training.seed)
            got, needed = input_vocab(model), input_vocab(self.model)
            if got != needed:
                raise ValueError(
                    f"got {settings.reference_model!r} with a vocabulary of {got}, needs the"
                    f" {needed} of the model that trains; name one with the same vocabulary"
                )
        return model.requires_grad_(False).to(training.device)


def load_task(config: Config) -> Task:
    """Load everything that a configuration names.

    Args:
        config: from `read_config`.

    Raises:
        UserError: something is missing or does not fit; the message names the key.
    """
    settings, seed = config.settings, config.training.seed
    loss_fn = load_loss(settings)
    if settings.dataset != EMBEDDED:
        require_packages("dataset", "datasets")
    _check_engine(loss_fn, config.training.device)
    _check_reference(settings, loss_fn)
    say = _teller(config)
    with blaming("dataset"):
        records = training_records(settings, seed, points=_takes_rated(loss_fn.loss), say=say)
    with blaming("held_out"):
        judged = held_out_records(settings, seed, say=say)
    with blaming("model"):
        tokenizer = load_tokenizer(settings, records)
        model = load_start(settings, tokenizer, seed)
    with blaming("dataset"):
        train = _features(settings, loss_fn, tokenizer, records, "training", say)
        _check_fields(loss_fn, train)
    held_out: Features = []
    evaluated: Features = []
    with blaming("held_out"):
        if judged:
            held_out = _pairs(settings, tokenizer, judged, "held-out", say)
            evaluated = held_out
        if judged and not loss_fn.loss.pairwise:
            evaluated = _features(settings, loss_fn, tokenizer, judged, "held-out", say)
    _check_tokens(tokenizer, model, [*train, *held_out, *evaluated])
    return Task(config, loss_fn, tokenizer, model, train, held_out, evaluated)


def load_loss(settings: Settings) -> PreferenceLoss:
    """The loss that the settings name.

    Raises:
        UserError: there is no such loss or hyperparameter.
    """
    options: dict[str, Any] = {"workspace_mb": settings.workspace_mb, "engine": settings.engine}
    hyperparameters = settings.loss_kwargs or {}
    for name in options.keys() & hyperparameters.keys():
        raise UserError(f"loss_kwargs: got {name}, needs it as a key of its own: {name}=…")
    with blaming("loss"):
        loss_fn = PreferenceLoss(settings.loss, **options, **hyperparameters)
        require_choice("path", loss_fn.op_options["path"], ("auto", *PATHS))
        require_number("drop_mass", loss_fn.op_options["drop_mass"], low=0, high=1, below=True)
    return loss_fn


def _takes_rated(loss: Loss) -> bool:
    return not loss.pairwise and "desirable" not in loss.needs


def _teller(config: Config) -> Callable[[str], None]:
    """What prints on one process and is silent on all others."""
    return partial(print, flush=True) if config.training.should_log else _silent


def _silent(said: str) -> None:
    pass


def _tell(say: Callable[[str], None], part: str, said: str) -> None:
    say(f"{part} data: {said}")


def _features(
    settings: Settings,
    loss_fn: PreferenceLoss,
    tokenizer: Any,
    records: Features,
    part: str = "training",
    say: Callable[[str], None] = print,
) -> Features:
    """Token ids of the records as the loss judges them; `part` of the data, for what is said."""
    if loss_fn.loss.pairwise:
        return _pairs(settings, tokenizer, records, part, say)
    rated = _takes_rated(loss_fn.loss)
    tell = partial(_tell, say, part)
    points = as_points(records, say=tell) if rated else as_judged(records)
    lengths = (settings.max_length, settings.prompt_length)
    features, counts = counted_points(points, tokenizer, *lengths, f"{part} completions")
    say(counts.message)
    return features


def _pairs(
    settings: Settings,
    tokenizer: Any,
    records: Features,
    part: str,
    say: Callable[[str], None],
) -> Features:
    """The same as pairs, whatever the loss judges."""
    lengths = (settings.max_length, settings.prompt_length)
    features, counts = counted_pairs(as_pairs(records), tokenizer, *lengths, f"{part} pairs")
    say(counts.message)
    return features


def _check_engine(loss_fn: PreferenceLoss, device: torch.device) -> None:
    """Raise where the engine that is asked for cannot run on the device that trains."""
    name = loss_fn.op_options["engine"]
    try:
        choose_engine(name, device, torch.float32)
    except ValueError as error:
        raise UserError(
            f"engine: got {name!r} on {device.type}, needs a GPU, or TRITON_INTERPRET=1 to try it"
            " slowly; auto takes what there is"
        ) from error


def _check_reference(settings: Settings, loss_fn: PreferenceLoss) -> None:
    """Raise where log-probs of whole completions, computed before training, are not enough."""
    needs = loss_fn.loss.needs
    shortened = loss_fn.ld_alpha is not None and "reference" in needs
    if settings.reference == "precomputed" and ("sequence_kl" in needs or shortened):
        raise UserError(
            f"reference: got precomputed, needs model or adapter: {loss_fn.name} wants more of the"
            " reference than the log-probs of whole completions"
        )


def _check_tokens(tokenizer: Any, model: nn.Module, features: Features) -> None:
    """Raise where a token is none of the model's, or batches cannot be padded."""
    if tokenizer.pad_token_id is None:
        raise UserError("tokenizer: got neither a padding nor an end token, needs one of them")
    found = [tokenizer.pad_token_id]
    for feature in features:
        for column in TOKEN_COLUMNS:
            ids = feature.get(column)
            found += [min(ids), max(ids)] if ids else []
    with blaming("tokenizer"):
        require_tokens("data", torch.tensor(found), input_vocab(model))


def _check_fields(loss_fn: PreferenceLoss, features: Features) -> None:
    """Raise unless every feature has what the loss needs."""
    if not features:
        raise ValueError(f"got no usable row, needs some that {loss_fn.name} can judge")
    columns = _PAIR_COLUMNS if loss_fn.loss.pairwise else _POINT_COLUMNS
    for field in sorted(loss_fn.loss.needs - _COMPUTED):
        if field not in columns:
            raise UserError(
                f"loss: {loss_fn.name} needs `{field}`, {WHAT_IT_IS[field]}, which this command"
                " does not compute"
            )
        names = columns[field]
        lacking = sum(any(name not in feature for name in names) for feature in features)
        if lacking:
            raise UserError(
                f"dataset: got no {' and '.join(names)}, needs it for {loss_fn.name}; {lacking} of"
                f" {len(features)} rows are without: add it to them, drop them, or name another"
                " loss"
            )

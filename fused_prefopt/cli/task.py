"""A training's task: data set, model and loss of a configuration, before anything trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_prefopt.checks import require_choice, require_number, require_tokens
from fused_prefopt.cli.config import EMBEDDED, Config, Settings
from fused_prefopt.cli.console import UserError, blaming, require_packages
from fused_prefopt.cli.data_files import FILES, rows_of
from fused_prefopt.cli.models import load_reference, load_start, load_tokenizer
from fused_prefopt.cli.needs import check_fields
from fused_prefopt.data import (
    ListCollator,
    PairCollator,
    PointCollator,
    lists_of_points,
    load_documents,
    make_pairs,
    make_points,
    pairs_of_points,
    points_of_lists,
    points_of_pairs,
    split_documents,
)
from fused_prefopt.data.columns import (
    CHOSEN,
    COMPLETIONS,
    COMPLETIONS_IDS,
    DESIRABLE,
    GROUP,
    PAIR,
    REFERENCE,
    REWARD,
    SCORES,
    TOKENS,
    has_values,
)
from fused_prefopt.data.records import adapted_records
from fused_prefopt.data.tokenise import counted_lists, counted_pairs, counted_points
from fused_prefopt.losses.protocol import OF_BOTH_HEADS, Loss
from fused_prefopt.models.causal_lm import input_vocab
from fused_prefopt.ops.engines import choose_engine
from fused_prefopt.ops.plan import PATHS
from fused_prefopt.preference import PreferenceLoss

Record = Mapping[str, Any]
Records = list[dict[str, Any]]
# Rows of token ids.
Features = list[dict[str, Any]]
Say = Callable[[str], None]
_GROUPED = (REWARD, GROUP)
# What losses judge.
LISTS, PAIRS, RATED, LABELLED = "lists", "pairs", "rated completions", "labelled completions"


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

    @property
    def has_lists(self) -> bool:
        """Whether each feature of `train` is a list of completions."""
        return COMPLETIONS_IDS in self.train[0]

    def collator(self, layout: str = "padded") -> PairCollator | PointCollator:
        """The collator of `train`, in one of the layouts of `Settings`.

        Raises:
            ValueError: prompts are to be shared by single completions or lists.
        """
        pad, packed = self.tokenizer.pad_token_id, layout == "packed"
        if self.has_lists:
            if layout == "shared_prompt":
                raise ValueError("layout: got shared_prompt with lists, which takes pairs alone")
            return ListCollator(pad, padding_free=packed)
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
        records = training_records(settings, seed, points=kind_of(loss_fn.loss) == RATED, say=say)
    with blaming("held_out"):
        judged = held_out_records(settings, seed, say=say)
    with blaming("model"):
        tokenizer = load_tokenizer(settings, records)
        model = load_start(settings, tokenizer, seed)
    with blaming("dataset"):
        train = _features(settings, loss_fn, tokenizer, records, "training", say)
        check_fields(loss_fn, train)
    held_out: Features = []
    evaluated: Features = []
    with blaming("held_out"):
        if judged:
            held_out = _pairs(settings, tokenizer, judged, "held-out", say)
            evaluated = held_out
        if judged and (_has_lists(judged) or not loss_fn.loss.pairwise):
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
    assert settings.loss is not None  # `Settings` checks it.
    with blaming("loss"):
        loss_fn = PreferenceLoss(settings.loss, **options, **hyperparameters)
        require_choice("path", loss_fn.op_options["path"], ("auto", *PATHS))
        require_number("drop_mass", loss_fn.op_options["drop_mass"], low=0, high=1, below=True)
    return loss_fn


def _teller(config: Config) -> Say:
    """What prints on one process and is silent on all others."""
    return partial(print, flush=True) if config.training.should_log else _silent


def _silent(said: str) -> None:
    """Of another process, or of a data set's other split, it was told already."""


def _tell(say: Say, part: str, said: str) -> None:
    say(f"{part} data: {said}")


def _features(
    settings: Settings,
    loss_fn: PreferenceLoss,
    tokenizer: Any,
    records: Features,
    part: str = "training",
    say: Say = print,
) -> Features:
    """Token ids of the records as the loss judges them; `part` of the data, for what is said."""
    kind, lengths = kind_of(loss_fn.loss, records), (settings.max_length, settings.prompt_length)
    if kind == LISTS:
        features, of_lists = counted_lists(records, tokenizer, *lengths, f"{part} lists")
        say(of_lists.message)
        return features
    if kind == PAIRS:
        return _pairs(settings, tokenizer, records, part, say)
    points = judged_records(records, kind, say=partial(_tell, say, part))
    features, counts = counted_points(points, tokenizer, *lengths, f"{part} completions")
    say(counts.message)
    return lists_of_points(features) if kind == RATED and _has_lists(records) else features


def _pairs(
    settings: Settings,
    tokenizer: Any,
    records: Features,
    part: str,
    say: Say,
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
    shortened = loss_fn.ld_alpha is not None and REFERENCE in needs
    if settings.reference == "precomputed" and (needs & OF_BOTH_HEADS or shortened):
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
        several = [feature.get(column) for column in TOKENS]
        for ids in (*several, *feature.get(COMPLETIONS_IDS, ())):
            found += [min(ids), max(ids)] if ids else []
    with blaming("tokenizer"):
        require_tokens("data", torch.tensor(found), input_vocab(model))


def training_records(settings: Settings, seed: int, *, points: bool, say: Say = print) -> Records:
    """What to train on, as the data set has it.

    Args:
        settings: names the data set.
        seed: of the embedded data.
        points: whether the embedded data is to be rated completions instead of pairs.
        say: tells the user what rows of another data set were read as.

    Raises:
        ValueError: the data set, split or adapter does not exist, no adapter or several fit the
            columns, a row does not fit the adapter, or no row is usable.
    """
    if settings.dataset == EMBEDDED:
        documents = split_documents(load_documents(), seed=seed)[0]
        flipped = partial(make_pairs, flip_rate=settings.flip_rate)
        return (make_points if points else flipped)(documents, seed=seed, limit=settings.limit)
    return _read(settings, settings.dataset, settings.split, settings.limit, say)


def held_out_records(settings: Settings, seed: int, *, say: Say = print) -> Records:
    """What to judge on, as the data set has it; of no rows without `held_out`.

    Args:
        settings: names the data set.
        seed: of the embedded data.
        say: tells the user what rows of another data set than that of training were read as.

    Raises:
        ValueError: as in `training_records`.
    """
    if settings.held_out is None:
        return []
    if Path(settings.held_out).suffix in FILES:
        return _read(settings, settings.held_out, "train", settings.held_out_limit, say)
    if settings.dataset == EMBEDDED:
        documents = split_documents(load_documents(), seed=seed)[1]
        return make_pairs(documents, seed=seed, limit=settings.held_out_limit)
    return _read(settings, settings.dataset, settings.held_out, settings.held_out_limit, _silent)


def kind_of(loss: Loss, records: Sequence[Record] = ()) -> str:
    """What a loss judges of records: `LISTS`, `PAIRS`, or completions, `RATED` or `LABELLED`."""
    if loss.pairwise:
        return LISTS if _has_lists(records) else PAIRS
    return LABELLED if DESIRABLE in loss.needs else RATED


def judged_records(records: Records, kind: str, *, say: Say = print) -> Records:
    """Records as losses of a kind judge them.

    Args:
        records: pairs, single completions or lists.
        kind: of `kind_of`.
        say: tells the user that completions were rated 1 and 0.

    Raises:
        ValueError: as `as_pairs` and `as_judged` do.
    """
    if kind == LISTS:
        return records
    if kind == PAIRS:
        return as_pairs(records)
    return as_points(records, say=say) if kind == RATED else as_judged(records)


def as_pairs(records: Records) -> Records:
    """Pairs; of rated completions and of lists the best and the worst of each prompt.

    Raises:
        ValueError: completions come without `reward` or `group`, or no prompt's rewards differ.
    """
    if _has_pairs(records):
        return records
    if _has_lists(records):
        records = points_of_lists(records)
    names = " and ".join(name for name in _GROUPED if not _all_have(records, name))
    if names:
        raise ValueError(
            f"rows: got single completions, not all with {names}, needs pairs, which pairwise"
            f" losses and held_out are judged on; give rows with {' and '.join(PAIR)}, or give each"
            " completion a rating and the number of its prompt in `group`; of labelled completions"
            " a loss such as kto learns"
        )
    pairs = pairs_of_points(records)
    if not pairs:
        raise ValueError(
            "rows: got no prompt with two completions of different reward, needs one to make a"
            " pair; give completions of one prompt the same number in `group`"
        )
    return pairs


def as_points(records: Records, *, say: Say = print) -> Records:
    """Single completions; those of a pair with its scores, or rated 1 and 0.

    Args:
        records: pairs, single completions or lists.
        say: tells the user that completions were rated 1 and 0.
    """
    if _has_lists(records):
        return points_of_lists(records)
    if not _has_pairs(records):
        return records
    unscored = sum(not has_values(record, SCORES) for record in records)
    if unscored:
        say(f"{unscored} of {len(records)} pairs have no scores: chosen is rated 1, rejected 0")
    return points_of_pairs(records)


def as_judged(records: Records) -> Records:
    """Completions with `desirable`: as they were judged, else those of pairs.

    Completions of pairs without scores get no `reward`.

    Raises:
        ValueError: completions come without `desirable`, and without `reward` or `group`.
    """
    if _all_have(records, DESIRABLE):
        return records
    if any(DESIRABLE in record for record in records):
        raise ValueError(
            "label: got some rows without, needs one in each; drop the others, or give all a label"
        )
    pairs = as_pairs(records)
    judged = []
    # Each pair's chosen completion comes first.
    for index, point in enumerate(points_of_pairs(pairs)):
        if not has_values(pairs[index // 2], SCORES):
            del point[REWARD]
        judged.append(point | {DESIRABLE: index % 2 == 0})
    return judged


def _read(settings: Settings, name: str, split: str, limit: int | None, say: Say) -> Records:
    records, said = adapted_records(name, rows_of(name, split, limit), settings.adapter)
    if not records:
        raise ValueError(f"got no usable row in {name}, split {split}")
    say(said)
    return records


def _has_pairs(records: Records) -> bool:
    return bool(records) and CHOSEN in records[0]


def _has_lists(records: Sequence[Record]) -> bool:
    return bool(records) and COMPLETIONS in records[0]


def _all_have(records: Records, name: str) -> bool:
    return all(name in record for record in records)

"""Checks of a trainer, its data sets and its batches: what a preference loss needs of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fused_prefopt.checks import require_tokens
from fused_prefopt.data import ListCollator, PairCollator, PointCollator
from fused_prefopt.data.columns import (
    CHOSEN_IDS,
    COMPLETION_IDS,
    COMPLETION_MASK,
    COMPLETIONS_IDS,
    GOLD,
    GOLD_LENGTHS,
    GROUP,
    GROUPS,
    INPUT_IDS,
    LABEL_COUNTS,
    PROMPT,
    PROMPT_LENGTHS,
    REWARD,
    REWARDS,
    SEGMENTS,
)
from fused_prefopt.data.labels import count_groups, count_labels
from fused_prefopt.integrations.attach import OF_REFERENCE, lacks_reference
from fused_prefopt.losses import check_needs
from fused_prefopt.models.batch import given_fields, gold_part
from fused_prefopt.models.causal_lm import input_vocab
from fused_prefopt.preference import PreferenceLoss

# Tokens that may fill the padded places, which are masked.
_FILLING = ("pad_token_id", "eos_token_id")


def refuse_functions_of_logits(given: Mapping[str, Any]) -> None:
    """Raise ValueError if a trainer is given a function that would never be called.

    Args:
        given: what a trainer is given, or has, by name.
    """
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if given.get(name) is not None:
            raise ValueError(
                f"{name}: got a function of logits, needs None: the loss is computed without them;"
                " log_tokens=True logs entropy, mean logits and token accuracy"
            )


def require_trainer(trainer: Any) -> None:
    """Raise ValueError unless a `transformers.Trainer` leaves batches and the model as they are."""
    refuse_functions_of_logits(vars(trainer))
    args = trainer.args
    if args.remove_unused_columns or trainer.label_names != [COMPLETION_MASK]:
        raise ValueError(
            "args: wanted remove_unused_columns=False and"
            f" label_names=[{COMPLETION_MASK!r}], got {args.remove_unused_columns} and"
            f" {trainer.label_names}"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"args: got n_gpu={args.n_gpu}, needs a process for each, as DataParallel would part"
            " chosen from rejected: start with `accelerate launch` or `torchrun`, or let"
            " CUDA_VISIBLE_DEVICES name one GPU"
        )
    if trainer.model_init is not None:
        raise ValueError(
            "model_init: got a function, needs a model: training would build one without the loss"
        )


def require_rows(
    trainer: Any,
    loss_fn: PreferenceLoss,
    fields_of: Callable[[Any], set[str]],
    *,
    streams: bool = False,
) -> None:
    """Raise ValueError, naming the data set, if the first row of one lacks what a loss needs.

    Args:
        trainer: has `train_dataset` and `eval_dataset`, one or several by name.
        loss_fn: the loss.
        fields_of: the `LogpBatch` fields that the loss can get with a row.
        streams: look into data sets without a length too, which must give their first row again.
    """
    for name, row in _first_rows(trainer.train_dataset, trainer.eval_dataset, streams):
        try:
            check_needs(loss_fn.name, loss_fn.loss.needs, fields_of(row))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def require_collated_rows(trainer: Any, loss_fn: PreferenceLoss, has_reference: bool) -> None:
    """`require_rows` of what the collator makes of a row, where it is one of this package.

    Args:
        trainer: as in `require_rows`, with a `data_collator`.
        loss_fn: the loss.
        has_reference: whether a reference gives what the rows do not have.
    """
    collator = trainer.data_collator
    if not isinstance(collator, PairCollator | PointCollator):
        return
    always = {PROMPT, PROMPT_LENGTHS} | (OF_REFERENCE if has_reference else set())

    def fields_of(row: Any) -> set[str]:
        batch = collator([row])
        given = given_fields(batch)
        found = {name for name, value in given.items() if value is not None} | always
        if gold_part(batch) is not None:
            found |= {GOLD, GOLD_LENGTHS}
        missing = loss_fn.loss.needs & OF_REFERENCE - found
        if missing:
            raise ValueError(lacks_reference(loss_fn, missing))
        if loss_fn.loss.pairwise and isinstance(collator, PointCollator):
            _require_lists(loss_fn, found)
            loss_fn.require_lists()
        return found

    require_rows(trainer, loss_fn, fields_of)


def _require_lists(loss_fn: PreferenceLoss, found: Collection[str]) -> None:
    """Raise ValueError unless completions come with what makes lists of them, for pairs."""
    columns = {GROUPS: GROUP, REWARDS: REWARD}
    lacking = [column for field, column in columns.items() if field not in found]
    if lacking:
        raise ValueError(
            f"got single completions without {' and '.join(map(repr, lacking))} for"
            f" {loss_fn.name}, which judges pairs; needs them, to pair the completions of a prompt,"
            " or rows of pairs or lists"
        )


def require_whole_lists(trainer: Any, loss_fn: PreferenceLoss) -> None:
    """Raise ValueError where a trainer would tear apart lists whose completions are rows.

    Args:
        trainer: a `transformers.Trainer`, with a `data_collator`.
        loss_fn: the loss.
    """
    collator = trainer.data_collator
    is_of_points = isinstance(collator, PointCollator) and not isinstance(collator, ListCollator)
    if not (loss_fn.loss.pairwise and is_of_points):
        return
    remedy = (
        "`data.lists_of_points` makes rows of whole lists of them, for `data.ListCollator`; or give"
        " the trainer a data loader of its own, with `data.GroupBatchSampler`"
    )
    for name in ("train", "eval"):
        loader = getattr(trainer, f"get_{name}_dataloader")
        own = getattr(loader, "__module__", "").startswith("transformers.")
        if own and getattr(trainer, f"{name}_dataset") is not None:
            raise ValueError(
                f"{name}_dataset: got rows of single completions for {loss_fn.name}, which judges"
                f" pairs, and batches that tear the completions of a prompt apart; {remedy}"
            )
    if trainer.accelerator.split_batches and trainer.accelerator.num_processes > 1:
        raise ValueError(
            "accelerator_config: got split_batches=True, which deals out the rows of a batch, with"
            f" rows of single completions for {loss_fn.name}; {remedy}"
        )


def let_collator_check(trainer: Any) -> None:
    """Check token ids and count labels before they are on a device that this would wait for."""
    collator = trainer.data_collator
    if not isinstance(collator, PairCollator | PointCollator):
        trainer.data_collator = CountedLabels(collator)
    elif collator.vocab_size is None:
        trainer.data_collator = replace(collator, vocab_size=input_vocab(trainer.model))


def collator_for(
    train_dataset: Any, eval_dataset: Any, tokenizer: Any, model: Any
) -> PairCollator | PointCollator | None:
    """The padding collator that fits the data sets' columns, None without data.

    Args:
        train_dataset: rows of token ids, as `tokenise_pairs`, `tokenise_points` or
            `tokenise_lists` return them.
        eval_dataset: the same, or several by name.
        tokenizer: whose padding token counts, or its last one; None takes the model's config.
        model: causal language model.

    Raises:
        ValueError: the rows are neither pairs nor points nor lists of token ids.
    """
    name, row = next(_first_rows(train_dataset, eval_dataset, streams=True), ("", None))
    if row is None:
        return None
    kinds: dict[str, type[PairCollator | PointCollator]] = {
        COMPLETIONS_IDS: ListCollator,
        CHOSEN_IDS: PairCollator,
        COMPLETION_IDS: PointCollator,
    }
    kind = next((kind for column, kind in kinds.items() if column in row), None)
    if kind is None:
        raise ValueError(
            f"{name}: got columns {', '.join(row)}, needs token ids in 'chosen_ids' and"
            " 'rejected_ids', in 'completion_ids' or in 'completions_ids' (see"
            " `data.tokenise_pairs`), or a data_collator"
        )
    sources = [each for each in (tokenizer, getattr(model, "config", None)) if each is not None]
    ids = [getattr(each, name, None) for each in sources for name in _FILLING]
    return kind(next((each for each in ids if isinstance(each, int)), 0))


def _first_rows(train: Any, evaluated: Any, streams: bool) -> Iterator[tuple[str, Any]]:
    """Name and first row of each data set that has one."""
    sets = {"train_dataset": train}
    if isinstance(evaluated, Mapping):
        sets |= {f"eval_dataset[{name!r}]": data for name, data in evaluated.items()}
    else:
        sets["eval_dataset"] = evaluated
    for name, data in sets.items():
        if data is None or not (streams or hasattr(data, "__len__")):
            continue
        row = next(iter(data), None)
        if row is not None:
            yield name, row


def leave_out_ligers_loss(args: Any) -> None:
    """With ``use_liger_kernel`` keep Liger's kernels of layers, and not its fused loss.

    That one comes with a forward of its own, which a trainer puts in the model's place when
    training starts: in place of an attached one.

    Args:
        args: of a `transformers.Trainer`; its `liger_kernel_config` is changed.
    """
    if args.use_liger_kernel:
        config = args.liger_kernel_config or {}
        args.liger_kernel_config = {**config, "fused_linear_cross_entropy": False}


@dataclass
class CheckedTokens:
    """A collator whose batches' token ids all have a row in the model's input embedding.

    Args:
        collator: any, of batches with `input_ids`.
        vocab_size: rows of the input embedding.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    vocab_size: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The collator's batch.

        Raises:
            ValueError: a token id is negative, or at least `vocab_size`.
        """
        batch = self.collator(examples)
        for name, ids in batch.items():
            if name.endswith(INPUT_IDS):
                require_tokens(name, ids, self.vocab_size)
        return batch


@dataclass
class CountedLabels:
    """A collator whose batches carry `LabelCounts`, also of the mismatched completions of TRL's.

    Args:
        collator: any; batches without `completion_mask` stay as they are.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The collator's batch."""
        batch = self.collator(examples)
        for name in [name for name in batch if name.endswith(COMPLETION_MASK)]:
            prefix = name.removesuffix(COMPLETION_MASK)
            part = {each[len(prefix) :]: batch[each] for each in batch if each.startswith(prefix)}
            if part[COMPLETION_MASK].device.type == "cpu" and SEGMENTS not in part:
                batch[prefix + LABEL_COUNTS] = count_labels(part)
        return count_groups(batch)

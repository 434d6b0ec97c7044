"""Columns of records, features and batches: all their names, and checks of what stands in them.

A record is a row of texts or chats, a feature is a row of token ids, a batch is what a collator
makes of features. Where a Hugging Face model is called, its own arguments are spelt out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.checks import closest

# Records: texts, or chats, which are lists of messages.
PROMPT, COMPLETION, COMPLETIONS = "prompt", "completion", "completions"
PAIR = CHOSEN, REJECTED = ("chosen", "rejected")
# A third completion of a pair's prompt, the best one; its second name is TRL's.
GOLDS = GOLD, _ = ("gold", "reference")
ROLE, CONTENT = "role", "content"
# Records and features: the judgements; of several names, the first that has values counts.
SCORES = SCORE_CHOSEN, SCORE_REJECTED = ("score_chosen", "score_rejected")
RATINGS = REWARD, SCORE, RATING = ("reward", "score", "rating")
REWARDS = "rewards"
LIST_RATINGS = (REWARDS, "scores", "ratings")
LABELS = DESIRABLE, LABEL = ("desirable", "label")
GROUP = "group"
# Records and features: how much a pair or a completion counts.
WEIGHT = "weight"
# Records of the embedded corpus: how a text was spoilt, and whether its pair was exchanged.
CORRUPTION, FLIPPED = "corruption", "flipped"

# Features: token ids.
TOKENS = PROMPT_IDS, CHOSEN_IDS, REJECTED_IDS, COMPLETION_IDS = (
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "completion_ids",
)
PAIR_IDS = (CHOSEN_IDS, REJECTED_IDS)
GOLD_IDS = "gold_ids"
# Of a list: the ids of each of its completions.
COMPLETIONS_IDS = "completions_ids"
# Features: how much each token of a completion counts; the last one in batches too, laid out as
# their `completion_mask`, or where prompts are shared as their `targets`.
TOKEN_WEIGHT_COLUMNS = (
    CHOSEN_TOKEN_WEIGHTS,
    REJECTED_TOKEN_WEIGHTS,
    GOLD_TOKEN_WEIGHTS,
    COMPLETIONS_TOKEN_WEIGHTS,
    TOKEN_WEIGHTS,
) = (
    "chosen_token_weights",
    "rejected_token_weights",
    "gold_token_weights",
    "completions_token_weights",
    "token_weights",
)
# Features and batches: a reference's log-probs of pairs, named as in TRL, of completions, and of
# each completion of a list.
PAIR_REFERENCES = REF_CHOSEN_LOGPS, REF_REJECTED_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
POINT_REFERENCES = REFERENCE, PROMPT_REFERENCE = ("reference", "prompt_reference")
LIST_REFERENCES = REFERENCES, PROMPT_REFERENCES = ("references", "prompt_references")
# The same of completions in TRL's batches; it has no name for the last, the prompts'.
TRL_REFERENCES = REF_LOGPS, REF_KL_LOGPS, REF_PROMPT_LOGPS = (
    "ref_logps",
    "ref_KL_logps",
    "ref_prompt_logps",
)
COLLISION, LIST_COLLISIONS = "collision", "collisions"
COLLISIONS = ("collision_chosen", "collision_rejected")

# Batches: how sequences are laid out; the first three are what Hugging Face's models call them.
INPUT_IDS, ATTENTION_MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"
COMPLETION_MASK, LABEL_COUNTS = "completion_mask", "label_counts"
SEQUENCE_IDS, NUM_SEQUENCES = "sequence_ids", "num_sequences"
# Of a shard, which has a part of each sequence's tokens: labels of what each token predicts.
SHARD_LABELS = SHIFT_LABELS, SHIFT_PROMPT_LABELS = ("shift_labels", "shift_prompt_labels")
# The same where a pair shares its prompt in one row.
SEGMENTS, PREDICTORS = "segments", "predictors"
TARGETS, TARGET_SEQUENCES = "targets", "target_sequences"
LAYOUT = (
    *(INPUT_IDS, ATTENTION_MASK, POSITION_IDS, COMPLETION_MASK, LABEL_COUNTS),
    *(SEQUENCE_IDS, NUM_SEQUENCES, SEGMENTS, PREDICTORS, TARGETS, TARGET_SEQUENCES),
    *(*SHARD_LABELS, TOKEN_WEIGHTS),
)
# A batch's flag that it stands for none: this rank's data have ended before those of others.
SPENT = "spent"
# Examples of which a collator made the batch, by number, where it left others out.
KEPT_ROWS = "kept_rows"
# TRL's prefix of the layout of mismatched completions.
MISMATCHED = "KL_"
# The prefix of the layout of gold completions.
OF_GOLD = "gold_"
# Of TRL's rows, as of ours: ids of completions, and the weights that belong to them.
WEIGHTS_OF_IDS = {
    CHOSEN_IDS: CHOSEN_TOKEN_WEIGHTS,
    REJECTED_IDS: REJECTED_TOKEN_WEIGHTS,
    GOLD_IDS: GOLD_TOKEN_WEIGHTS,
    COMPLETIONS_IDS: COMPLETIONS_TOKEN_WEIGHTS,
    COMPLETION_IDS: TOKEN_WEIGHTS,
    f"{MISMATCHED}{COMPLETION_IDS}": f"{MISMATCHED}{TOKEN_WEIGHTS}",
}

# Records and features: a list's column with an entry for each completion, and that of one alone.
LIST_COLUMNS = {
    COMPLETIONS: COMPLETION,
    COMPLETIONS_IDS: COMPLETION_IDS,
    COMPLETIONS_TOKEN_WEIGHTS: TOKEN_WEIGHTS,
    REWARDS: REWARD,
    REFERENCES: REFERENCE,
    PROMPT_REFERENCES: PROMPT_REFERENCE,
    LIST_COLLISIONS: COLLISION,
}

# Batches: fields of `LogpBatch`, and the columns of features that they are made of.
GROUPS, KL = "groups", "kl"
PROMPT_LENGTHS = "prompt_lengths"
GOLD_LENGTHS = "gold_lengths"
SEQUENCE_KL, WEIGHTS = "sequence_kl", "weights"
# A pair's weight is that of both its completions.
PAIR_FIELDS = {REWARDS: SCORES, COLLISION: COLLISIONS, WEIGHTS: (WEIGHT, WEIGHT)}
POINT_FIELDS = {
    REWARDS: (REWARD,),
    GROUPS: (GROUP,),
    DESIRABLE: (DESIRABLE,),
    REFERENCE: (REFERENCE,),
    PROMPT_REFERENCE: (PROMPT_REFERENCE,),
    SEQUENCE_KL: (SEQUENCE_KL,),
    COLLISION: (COLLISION,),
    WEIGHTS: (WEIGHT,),
}
# Scores that stand for labels, and a flag that a batch's rewards are such, for the metrics.
LABEL_REWARDS, MADE_UP_REWARDS = "label_rewards", "made_up_rewards"

# Not every row of a data set need have been scored.
_PARTLY = frozenset((REWARD, *SCORES))
# What Python, NumPy and torch raise of values that are no number, or several.
_UNREADABLE = (TypeError, ValueError, OverflowError, RuntimeError)


def require_columns(row: Mapping[str, Any], wanted: Iterable[str], where: str = "") -> None:
    """Raise ValueError naming the missing columns, the closest to them, and those there are.

    Args:
        row: a record or a feature.
        wanted: names of columns.
        where: which row it is, such as `row_at(3)`, to begin the message; "" does not say.

    Raises:
        ValueError: a column is missing.
    """
    missing = [f"{name!r}{closest(name, row)}" for name in wanted if name not in row]
    if missing:
        place = f"{where}: " if where else ""
        raise ValueError(
            f"{place}missing column {', '.join(missing)}; got {', '.join(map(repr, row))}"
        )


def has_values(row: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a row has all these columns, none of them None."""
    return all(row.get(name) is not None for name in names)


def row_at(index: int) -> str:
    """A record's place as messages name it."""
    return f"row {index} (counted from 0)"


def feature_at(index: int, feature: Any = None) -> str:
    """A feature's place as messages name it; a completion of a list knows its own, `place`."""
    place: str = getattr(feature, "place", f"feature {index}")
    return place


def column_of(rows: Iterable[Mapping[str, Any]], names: Iterable[str]) -> str | None:
    """The first of these columns with a value in any row, or None."""
    rows = list(rows)
    return next((name for name in names if any(row.get(name) is not None for row in rows)), None)


def finite_number(name: str, value: Any, where: str) -> float:
    """A score or a log-prob as a float.

    Args:
        name: of its column.
        value: what stands there; text that spells a number is one.
        where: which row it is, such as `row_at(3)` or `feature_at(3)`.

    Raises:
        ValueError: it is no number (a bool is none), NaN or infinite.
    """
    try:
        number = math.nan if _is_bool(value) else float(value)
    except _UNREADABLE:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{name}: got {value!r} in {where}, wanted a finite number; repair the value or drop"
            " the row"
        )
    return number


def weight(name: str, value: Any, where: str) -> float:
    """A weight as a float.

    Args:
        name: of its column.
        value: what stands there.
        where: which row it is.

    Raises:
        ValueError: it is no finite number, or a negative one.
    """
    number = finite_number(name, value, where)
    if number < 0:
        raise ValueError(
            f"{name}: got {value!r} in {where}, wanted a number >= 0; 0 leaves the row out"
        )
    return number


def whole_number(name: str, value: Any, where: str) -> int:
    """A group as an int.

    Args:
        name: of its column.
        value: what stands there.
        where: which row it is.

    Raises:
        ValueError: it is no integer.
    """
    try:
        number = int(value)
        if not _is_bool(value) and (isinstance(value, str) or number == value):
            return number
    except _UNREADABLE:
        pass
    raise ValueError(
        f"{name}: got {value!r} in {where}, wanted an integer; number the prompts 0, 1, …"
    )


def judgement(name: str, value: Any, where: str) -> bool:
    """A label as a bool.

    Args:
        name: of its column.
        value: what stands there: a bool, or a number that is 0 or 1.
        where: which row it is.

    Raises:
        ValueError: it is anything else.
    """
    if not isinstance(value, str):
        try:
            if value in (0, 1):
                return bool(value)
        except _UNREADABLE:
            pass
    raise ValueError(
        f"{name}: got {value!r} in {where}, wanted true or false, or 1 or 0; map what is desirable"
        " to true and everything else to false"
    )


_Reader = Callable[[str, Any, str], float]
_NUMBER: tuple[_Reader, torch.dtype] = (finite_number, torch.float32)
# Column → what reads its values, and their dtype; of every other column they are numbers.
_KINDS: dict[str, tuple[_Reader, torch.dtype]] = {
    GROUP: (whole_number, torch.int64),
    WEIGHT: (weight, torch.float32),
    **dict.fromkeys(LABELS, (judgement, torch.bool)),
}


def read_value(name: str, value: Any, where: str) -> float:
    """The value of a column of single values: int of a group, bool of a label, or float.

    Args:
        name: of its column.
        value: what stands there.
        where: which row it is.

    Raises:
        ValueError: as `finite_number`, `weight`, `whole_number` or `judgement` do.
    """
    read, _ = _KINDS.get(name, _NUMBER)
    return read(name, value, where)


def is_given(features: Sequence[Mapping[str, Any]], *names: str) -> bool:
    """Whether a batch is to have columns: any feature has one; of scores, every one has all.

    A weight of None is none of 1: of weights any feature has the column.
    """
    if WEIGHT in names:
        return any(WEIGHT in feature for feature in features)
    there = [name for name in names if any(name in feature for feature in features)]
    if len(there) == len(names) and _PARTLY.issuperset(names):
        return all(has_values(feature, names) for feature in features)
    return any(feature.get(name) is not None for feature in features for name in there)


def stacked(features: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """A column of the features.

    Args:
        features: S rows.
        name: of the column.

    Returns:
        (S,), int64 of groups, bool of labels, float32 of everything else.

    Raises:
        ValueError: a feature has no value, or one that is none of its kind or not finite; the
            message has the feature's index.
    """
    read, dtype = _KINDS.get(name, _NUMBER)
    values = []
    for index, feature in enumerate(features):
        where = feature_at(index, feature)
        require_columns(feature, (name,), where)
        if feature[name] is None:
            raise ValueError(f"{name}: got None in {where}, needs a value in each or none")
        values.append(read(name, feature[name], where))
    column = torch.tensor(values, dtype=dtype)
    if dtype.is_floating_point and not column.isfinite().all():
        index = int(column.isfinite().logical_not().nonzero()[0])
        where = feature_at(index, features[index])
        raise ValueError(
            f"{name}: got {values[index]!r} in {where}, wanted a number within {dtype}; scale the"
            " column"
        )
    return column


def _is_bool(value: Any) -> bool:
    # NumPy's and torch's bools, and arrays of them, say so by their dtype.
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")

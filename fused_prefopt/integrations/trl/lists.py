"""Rows of lists in TRL's trainers: tokenised by TRL, cut, and kept whole as a row each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, ClassVar

from datasets import Dataset
from datasets.fingerprint import Hasher

from fused_prefopt.data import ListCollator
from fused_prefopt.data.columns import (
    CHOSEN,
    COLLISION,
    COMPLETION,
    COMPLETION_IDS,
    COMPLETIONS,
    COMPLETIONS_IDS,
    GROUP,
    GROUPS,
    LABEL,
    LIST_COLLISIONS,
    LIST_COLUMNS,
    LIST_RATINGS,
    LIST_REFERENCES,
    PAIR_IDS,
    POINT_REFERENCES,
    PROMPT,
    PROMPT_IDS,
    PROMPT_LENGTHS,
    PROMPT_REFERENCE,
    PROMPT_REFERENCES,
    RATINGS,
    REF_LOGPS,
    REF_PROMPT_LOGPS,
    REFERENCE,
    REFERENCES,
    REJECTED,
    REWARD,
    REWARDS,
    TOKEN_WEIGHTS,
    WEIGHT,
    column_of,
    finite_number,
    require_columns,
    row_at,
    weight,
)
from fused_prefopt.data.list_rows import Member, lists_of_points, members_of
from fused_prefopt.data.token_weights import refuse_token_weights
from fused_prefopt.data.truncation import ListCounts, cut_side
from fused_prefopt.integrations.attach import OF_REFERENCE
from fused_prefopt.integrations.layouts import PADDING_FREE
from fused_prefopt.integrations.trl.rows import Cut
from fused_prefopt.losses.protocol import OF_BOTH_HEADS

# What TRL renders a chat with, beside its messages.
_OF_CHATS = ("tools", "chat_template_kwargs")
# Columns of lists of token ids that no trainer is to drop, beside those of any row.
OF_LISTS = (COMPLETIONS_IDS, REWARDS, *LIST_REFERENCES, LIST_COLLISIONS)
# Fields of `LogpBatch` that a loss can get of lists.
FIELDS_OF_LISTS = {GROUPS, REWARDS, PROMPT, PROMPT_LENGTHS} | OF_REFERENCE
Tokenise = Callable[[Any, Any], Any]


def has_lists(row: Mapping[str, Any]) -> bool:
    """Whether a row is a list: of texts, chats or token ids."""
    return row.get(COMPLETIONS) is not None or COMPLETIONS_IDS in row


def refuse_lists(why: str, *datasets: Any) -> None:
    """Raise ValueError if the first row of a data set, one or several by name, is a list.

    Args:
        why: lists cannot be taken there, to begin the message.
        *datasets: of a trainer; None and those without rows are passed over.
    """
    for given in datasets:
        for data in given.values() if isinstance(given, Mapping) else (given,):
            if has_lists(next(iter(data if data is not None else ()), {})):
                raise ValueError(f"{why}, with rows of lists; needs rows of pairs or completions")


def _in_python(dataset: Any, name: str) -> Any:
    """A data set whose rows are Python's lists and numbers, in whatever format it was given."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name}_dataset: got a stream in a trainer on lists, wanted a data set with a length:"
            " they are put together of rows that TRL has tokenised"
        )
    return dataset.with_format(None)


def lists_by_pairs(dataset: Any, name: str, args: Any, tokenise: Tokenise) -> Any:
    """Lists as rows of token ids, tokenised as TRL's trainer on pairs does it.

    Args:
        dataset: rows of `prompt`, `completions` and a number for each in `rewards`, `scores` or
            `ratings`, or of token ids, which are taken as they are.
        name: of the data set, as TRL calls it.
        args: of the trainer.
        tokenise: rows of pairs and the configuration to rows of pairs of token ids.

    Raises:
        ValueError: the data set is a stream, or a row has not a number for each completion.
    """
    dataset = _in_python(dataset, name)
    first = next(iter(dataset))
    if COMPLETIONS_IDS in first:
        return dataset
    rating = _rating_of_texts(first, name)
    pairs = dataset.map(
        partial(_in_pairs, rating),
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
    )
    tokenised = tokenise(pairs, uncut(args))
    parts = tokenised.select_columns([PROMPT_IDS, *PAIR_IDS])
    own = _places(tokenised[GROUP][:])
    return _joined(dataset, parts, own, partial(_list_of_pairs, rating))


def points_of(dataset: Any, name: str) -> Any:
    """Lists of texts or token ids as rows of single completions, numbered by list in `group`.

    Args:
        dataset: as in `lists_by_pairs`.
        name: of the data set, as TRL calls it.

    Raises:
        ValueError: as in `lists_by_pairs`.
    """
    dataset = _in_python(dataset, name)
    first = next(iter(dataset))
    rating = REWARDS if COMPLETIONS_IDS in first else _rating_of_texts(first, name)
    return dataset.map(
        partial(_in_points, rating),
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
    )


def lists_of_rows(dataset: Any, name: str) -> Any:
    """Rows of single completions in token ids put together to lists by their `group`.

    Args:
        dataset: with `prompt_ids`, `completion_ids`, `group`, a `reward`, `score` or `rating`, and
            what else single completions may have.
        name: of the data set, as TRL calls it.

    Raises:
        ValueError: the data set is a stream, lacks a column or a value, or a group has two prompts.
    """
    dataset = _in_python(dataset, name)
    first = next(iter(dataset))
    rating = column_of([first], RATINGS) or REWARD
    require_columns(first, (GROUP, rating), f"{name}_dataset, for lists")
    wanted = {name: name for name in (PROMPT_IDS, COMPLETION_IDS, GROUP, WEIGHT, TOKEN_WEIGHTS)}
    wanted |= {name: name for name in (*POINT_REFERENCES, COLLISION)} | {rating: REWARD}
    wanted |= {REF_LOGPS: REFERENCE, REF_PROMPT_LOGPS: PROMPT_REFERENCE}
    names = {name: wanted[name] for name in wanted if name in dataset.column_names}
    own = _places(dataset[GROUP][:])
    heads = dataset.select([places[0] for places in own])
    parts = dataset.select_columns(list(names))
    return _joined(heads, parts, own, partial(_list_of_points, names))


def kept_lists(dataset: Any, name: str, args: Any, cut: Cut) -> Any:
    """The lists without what teaches nothing, as `data.tokenise_lists` leaves it out.

    Args:
        dataset: rows of `prompt_ids`, `completions_ids` and `rewards`.
        name: of the data set, as TRL calls it.
        args: of the trainer; where it logs, one message counts what was dropped.
        cut: of the trainer's collator.

    Raises:
        ValueError: no list is left, or a row has not a finite number for each completion.
    """
    counts = ListCounts(f"{name} data", cut.max_length)
    places: list[list[int]] = []
    for index, row in enumerate(dataset):
        members = members_of(row, row_at(index))
        rewards = [finite_number(REWARD, each[REWARD], each.place) for each in members]
        if WEIGHT in row:
            weight(WEIGHT, row[WEIGHT], row_at(index))
        whole = [(each[PROMPT_IDS], each[COMPLETION_IDS]) for each in members]
        sides = [cut_side(*side, cut.max_length, cut.mode) for side in whole]
        places.append(counts.kept_of(whole, sides, rewards))
    counts.require_some(f"{name} data")
    if args.should_log:
        counts.log()
    if counts.kept == counts.read:
        return dataset
    left = [index for index, kept in enumerate(places) if kept]
    chosen = dataset.select(left)
    return chosen.map(partial(_picked, [places[index] for index in left]), with_indices=True)


def _rating_of_texts(first: Mapping[str, Any], name: str) -> str:
    """The column of the ratings of lists of texts, of which this is the first."""
    where = f"{row_at(0)} of the {name} data"
    require_columns(first, (PROMPT, COMPLETIONS), where)
    refuse_token_weights(first, where)
    return column_of([first], LIST_RATINGS) or REWARDS


def uncut(args: Any) -> Any:
    """The configuration with which TRL drops no row: half of a list might go."""
    args = copy(args)
    args.max_length = None
    return args


def _members(
    rating: str, rows: Mapping[str, list[Any]], indices: list[int]
) -> Iterable[tuple[int, dict[str, Any], list[Any]]]:
    """Index, columns and completions of each row of a batch."""
    for place, index in enumerate(indices):
        row = {name: values[place] for name, values in rows.items()}
        yield index, row, members_of({**row, REWARDS: row.get(rating)}, row_at(index))


def _in_pairs(
    rating: str, rows: Mapping[str, list[Any]], indices: list[int]
) -> dict[str, list[Any]]:
    """Two completions after another as a pair each; an odd one is both sides of the last."""
    names = [name for name in _OF_CHATS if name in rows]
    pairs: dict[str, list[Any]] = {each: [] for each in (PROMPT, CHOSEN, REJECTED, GROUP, *names)}
    for index, row, members in _members(rating, rows, indices):
        for place in range(0, len(members), 2):
            second = members[min(place + 1, len(members) - 1)]
            pairs[PROMPT].append(row[PROMPT])
            pairs[CHOSEN].append(members[place][COMPLETION])
            pairs[REJECTED].append(second[COMPLETION])
            pairs[GROUP].append(index)
            for name in names:
                pairs[name].append(row[name])
    return pairs


def _in_points(
    rating: str, rows: Mapping[str, list[Any]], indices: list[int]
) -> dict[str, list[Any]]:
    """Each completion as a row, rated, with its list's number; desirable is what is rated above 0.

    TRL asks for such a label, which no loss is told of.
    """
    kept = [name for name in _OF_CHATS if name in rows]
    points: list[dict[str, Any]] = []
    for index, row, members in _members(rating, rows, indices):
        for each in members:
            label = {LABEL: finite_number(REWARD, each[REWARD], each.place) > 0}
            points.append({**each, GROUP: index, **label, **{name: row[name] for name in kept}})
    return {name: [point[name] for point in points] for name in points[0]}


def _places(groups: Iterable[Any]) -> list[list[int]]:
    """Where the rows of each group stand, in order of first appearance."""
    places: dict[Any, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    return list(places.values())


def _joined(
    dataset: Any, parts: Any, own: list[list[int]], join: Callable[..., dict[str, Any]]
) -> Any:
    """Each row of the data set with its own of the parts, which stand in these places of them."""

    def joined(row: dict[str, Any], index: int) -> dict[str, Any]:
        columns = parts[own[index]]
        entries = zip(own[index], *columns.values(), strict=True)
        rows = [
            Member(dict(zip(columns, values, strict=True)), row_at(place))
            for place, *values in entries
        ]
        return join(row, rows, row_at(index))

    return dataset.map(
        joined,
        with_indices=True,
        remove_columns=dataset.column_names,
        # Of a function with a data set in it there would be none.
        new_fingerprint=Hasher.hash((dataset._fingerprint, parts._fingerprint, join)),
    )


def _list_of_pairs(
    rating: str, row: Mapping[str, Any], pairs: list[Member], where: str
) -> dict[str, Any]:
    """A list of token ids, of its pairs'."""
    sides = [
        {PROMPT_IDS: pair[PROMPT_IDS], COMPLETION_IDS: pair[name]}
        for pair in pairs
        for name in PAIR_IDS
    ]
    members = members_of({**row, REWARDS: row[rating]}, where)
    # The last of the sides may be there twice.
    for member, side in zip(members, sides, strict=False):
        del member[PROMPT], member[COMPLETION]
        member |= {GROUP: 0, **side}
    return _list_of(members)


def _list_of_points(
    names: Mapping[str, str], _: Any, rows: list[Member], where: str
) -> dict[str, Any]:
    """A list of token ids, of its completions'."""
    return _list_of(
        [Member({names[name]: value for name, value in row.items()}, row.place) for row in rows]
    )


def _list_of(members: Sequence[Member]) -> dict[str, Any]:
    """A list of token ids of the rows of its completions."""
    share_prompt(members)
    return lists_of_points(members)[0]


def share_prompt(members: Sequence[dict[str, Any]]) -> None:
    """Let completions of one prompt begin at one place: where the first of them does.

    TRL begins a completion where it and the prompt alone cease to be the same tokens.
    """
    shortest = min((each[PROMPT_IDS] for each in members), key=len)
    for each in members:
        prompt, size = each[PROMPT_IDS], len(shortest)
        # Another prompt, or weights of tokens, are told of where the list is made.
        if prompt[:size] == shortest and TOKEN_WEIGHTS not in each:
            each[PROMPT_IDS] = shortest
            each[COMPLETION_IDS] = prompt[size:] + each[COMPLETION_IDS]


def _picked(places: list[list[int]], row: dict[str, Any], index: int) -> dict[str, Any]:
    """A list's columns of the completions in these places."""
    return {
        name: [row[name][place] for place in places[index]]
        for name in LIST_COLUMNS
        if row.get(name) is not None
    }


class TakesLists:
    """Mixin for a trainer of TRL's whose rows may be lists, which a `ListCollator` lays out."""

    config_type: ClassVar[Any]
    args: Any
    needs: Any
    needs_reference: bool
    _layout: str | None
    _tokenizer: Any
    # Whether rows are lists.
    _has_lists: bool = False
    # Whether they are single completions, of which a loss on pairs wants lists.
    _makes_lists: bool = False
    _is_laid_out: bool
    # Their collator, without what checks its batches.
    _lays_out_lists: Any
    _lay_out: Any
    _reference_logps: Any
    _reference_of: Any
    _own_reference_logps: Any

    def _list_collator(self) -> ListCollator:
        """The collator of lists, with the cut of TRL's own; it pads where no layout is asked for.

        Raises:
            ValueError: the layout that is asked for is for pairs.
        """
        if self._layout not in (None, PADDING_FREE):
            raise ValueError(
                f"{self._layout}: got True with rows of lists, needs False: it is for pairs"
            )
        cut = Cut.of(self.args, self.config_type.pairwise)
        return ListCollator(
            self._tokenizer.pad_token_id,
            padding_free=self._layout == PADDING_FREE,
            pad_to_multiple_of=getattr(self.args, "pad_to_multiple_of", None),
            max_length=cut.max_length,
            truncation_mode=cut.mode,
        )

    def _take_lists(self, name: str) -> None:
        """From here on rows are lists, which is what a batch counts.

        Raises:
            ValueError: the trainer was made with rows of another kind.
        """
        if self._is_laid_out and not self._has_lists:
            raise ValueError(
                f"{name}_dataset: got rows of lists, for a trainer that was made with others; give"
                " the data set as `eval_dataset` when it is made"
            )
        self._has_lists = True

    def _kept_lists(self, dataset: Any, name: str, args: Any) -> Any:
        """Rows of lists in token ids without what teaches nothing."""
        self._take_lists(name)
        return kept_lists(dataset, name, args, Cut.of(args, self.config_type.pairwise))

    def _of_lists(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch of a `ListCollator` as the loss takes it, with what the reference gives."""
        batch = dict(inputs)
        separate = self.needs_reference and not self.needs & OF_BOTH_HEADS
        if separate and REFERENCE not in batch:
            wanted = PROMPT_REFERENCE in self.needs
            found = self._reference_logps(self._reference_of(model), inputs, prompt=wanted)
            batch[REFERENCE] = found["completion"]
            if wanted:
                batch[PROMPT_REFERENCE] = found["prompt"]
        return batch

    def _with_list_references(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Lists with the reference's log-probs of each completion; pairs with their own."""
        dataset = _in_python(dataset, name)
        if REFERENCES in dataset.column_names:
            return dataset
        # Here TRL's constructor may not be through.
        self._lay_out()
        rows = self._own_reference_logps(list(dataset), self._lays_out_lists, name, batch_size)
        names = [each for each in rows[0] if each not in dataset.column_names]
        if PROMPT_REFERENCE not in self.needs:
            names = [each for each in names if each != PROMPT_REFERENCES]
        for each in names:
            dataset = dataset.add_column(each, [row[each] for row in rows])
        return dataset

"""Texts and chats turned into token ids within a length, and a trained tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fused_prefopt.data.adapters import weight_of
from fused_prefopt.data.columns import (
    CHOSEN_IDS,
    COMPLETION,
    COMPLETION_IDS,
    COMPLETIONS_IDS,
    DESIRABLE,
    GOLD,
    GOLD_IDS,
    GROUP,
    LABELS,
    PAIR,
    PROMPT,
    PROMPT_IDS,
    RATINGS,
    REJECTED_IDS,
    REWARD,
    REWARDS,
    SCORES,
    column_of,
    has_values,
    read_value,
    require_columns,
    row_at,
)
from fused_prefopt.data.list_rows import members_of
from fused_prefopt.data.truncation import ListCounts, RowCounts

Ids = list[int]
Record = Mapping[str, Any]
Features = list[dict[str, Any]]
_END = "<|endoftext|>"
_PAD = "<|pad|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    + _END
    + "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenise_pairs(
    records: Iterable[Record], tokenizer: Any, max_length: int, max_prompt_length: int
) -> Features:
    """Token ids of preference pairs.

    Texts are encoded on their own, the prompt after the tokenizer's beginning-of-text token if it
    uses one, each completion before its end-of-text token. Chats go through the chat template,
    which decides how a turn ends; the completion is what the whole chat has after the prompt.
    Prompts lose tokens from the left (never the beginning-of-text token), completions from the
    right, the end-of-text token first. Pairs that end as the same tokens on both sides, or with a
    side without any label (nothing predicts the first token of an empty prompt's completion), are
    dropped. One log message counts all this: a warning if any pair was dropped or more than half
    of them were cut.

    Args:
        records: with `prompt`, `chosen`, `rejected`: three strings, or three lists of
            ``{"role", "content"}`` messages; `score_chosen` and `score_rejected` are kept if
            both are there, and `weight`; and `gold`, a third completion of the prompt.
        tokenizer: has `encode(text, add_special_tokens=...)` and `eos_token_id`; for chats
            `apply_chat_template`. Hugging Face tokenizers do.
        max_length: tokens of prompt and completion together.
        max_prompt_length: tokens of the prompt, fewer than `max_length`, so that a completion
            always keeps one.

    Returns:
        One dict a pair that is kept: `prompt_ids`, `chosen_ids`, `rejected_ids`, and `gold_ids` of
        a `gold` (lists of int), and the scores and the weight as floats.

    Raises:
        ValueError: a length does not fit, a column is missing, a score or weight is no finite
            number, there are weights of tokens, the tokenizer has no end-of-text token, a chat's
            prompt is not a prefix of the whole chat, or no pair is left.
    """
    features, counts = counted_pairs(records, tokenizer, max_length, max_prompt_length)
    counts.log()
    return features


def tokenise_points(
    records: Iterable[Record], tokenizer: Any, max_length: int, max_prompt_length: int
) -> Features:
    """Token ids of rated or judged completions, made as `tokenise_pairs` does.

    Args:
        records: with `prompt` and `completion`, both strings or both lists of messages; kept if
            present are `group`, `weight`, the first of `reward`, `score` and `rating` that has
            values, and the first of `desirable` and `label`.
        tokenizer: as for `tokenise_pairs`.
        max_length: tokens of prompt and completion together.
        max_prompt_length: tokens of the prompt, fewer than `max_length`.

    Returns:
        One dict a completion that is kept: `prompt_ids`, `completion_ids` (lists of int),
        `reward` and `weight` (float), `group` (int), `desirable` (bool).

    Raises:
        ValueError: as for `tokenise_pairs`; a group is no integer, or a label neither a bool nor
            0 or 1.
    """
    features, counts = counted_points(records, tokenizer, max_length, max_prompt_length)
    counts.log()
    return features


def tokenise_lists(
    records: Iterable[Record], tokenizer: Any, max_length: int, max_prompt_length: int
) -> Features:
    """Token ids of lists, the rated completions of a prompt, made as `tokenise_pairs` does.

    Completions without any label are dropped, as are those that end as the same tokens as one
    before them in their list, and lists that have no two completions of different reward left.

    Args:
        records: with `prompt`, `completions` and `rewards`, as the adapter `lists` makes them, or
            `chosen` and `rejected`, a list of two, with their scores or rated 1 and 0; `weight` is
            kept.
        tokenizer: as for `tokenise_pairs`.
        max_length: tokens of prompt and completion together.
        max_prompt_length: tokens of the prompt, fewer than `max_length`.

    Returns:
        One dict a list that is kept: `prompt_ids` (list of int), `completions_ids` (K lists of
        int), `rewards` (K floats) and `weight` (float).

    Raises:
        ValueError: as for `tokenise_pairs`; a list has not a reward for each completion.
    """
    features, counts = counted_lists(records, tokenizer, max_length, max_prompt_length)
    counts.log()
    return features


def counted_pairs(
    records: Iterable[Record],
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    what: str = "pairs",
) -> tuple[Features, RowCounts]:
    """`tokenise_pairs`, with the counts instead of a log message, which `what` begins."""
    encoder = _Encoder(tokenizer, max_length, max_prompt_length)
    counts = RowCounts(what, max_length, max_prompt_length)
    features = []
    for index, record in enumerate(records):
        where = row_at(index)
        require_columns(record, (PROMPT, *PAIR), where)
        whole = [encoder.encode(record[PROMPT], record[side], where) for side in PAIR]
        cut = [encoder.fit(*side) for side in whole]
        scores = weight_of(record, where)
        if has_values(record, SCORES):
            scores |= {name: read_value(name, record[name], where) for name in SCORES}
        if counts.keeps(whole, cut):
            (prompt, chosen), (_, rejected) = cut
            ids = {PROMPT_IDS: prompt, CHOSEN_IDS: chosen, REJECTED_IDS: rejected}
            if record.get(GOLD) is not None:
                best = encoder.encode(record[PROMPT], record[GOLD], where)
                ids[GOLD_IDS] = encoder.fit(*best)[1]
            features.append({**ids, **scores})
    counts.require_some("records")
    return features, counts


def counted_points(
    records: Iterable[Record],
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    what: str = "completions",
) -> tuple[Features, RowCounts]:
    """`tokenise_points`, with the counts instead of a log message, which `what` begins."""
    encoder = _Encoder(tokenizer, max_length, max_prompt_length)
    counts = RowCounts(what, max_length, max_prompt_length, pairwise=False)
    records = list(records)
    sources = {
        REWARD: column_of(records, RATINGS),
        GROUP: GROUP,
        DESIRABLE: column_of(records, LABELS),
    }
    features = []
    for index, record in enumerate(records):
        where = row_at(index)
        require_columns(record, (PROMPT, COMPLETION), where)
        whole = encoder.encode(record[PROMPT], record[COMPLETION], where)
        prompt, completion = encoder.fit(*whole)
        extras = {
            name: read_value(source, record[source], where)
            for name, source in sources.items()
            if source is not None and record.get(source) is not None
        } | weight_of(record, where)
        if counts.keeps([whole], [(prompt, completion)]):
            features.append({PROMPT_IDS: prompt, COMPLETION_IDS: completion, **extras})
    counts.require_some("records")
    return features, counts


def counted_lists(
    records: Iterable[Record],
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    what: str = "lists",
) -> tuple[Features, ListCounts]:
    """`tokenise_lists`, with the counts instead of a log message, which `what` begins."""
    encoder = _Encoder(tokenizer, max_length, max_prompt_length)
    counts = ListCounts(what, max_length, max_prompt_length)
    features = []
    for index, record in enumerate(records):
        where = row_at(index)
        require_columns(record, (PROMPT,), where)
        members = members_of(record, where)
        rewards = [read_value(REWARD, each[REWARD], each.place) for each in members]
        whole = [encoder.encode(each[PROMPT], each[COMPLETION], each.place) for each in members]
        cut = [encoder.fit(*side) for side in whole]
        kept = counts.kept_of(whole, cut, rewards)
        if kept:
            ids = {PROMPT_IDS: cut[0][0], COMPLETIONS_IDS: [cut[place][1] for place in kept]}
            rated = {REWARDS: [rewards[place] for place in kept]}
            features.append({**ids, **rated, **weight_of(record, where)})
    counts.require_some("records")
    return features, counts


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer; it has no unknown token, any text has an encoding.

    Args:
        texts: to train on.
        vocab_size: entries, the 256 bytes and two special tokens included.

    Returns:
        A `transformers.PreTrainedTokenizerFast` with end-of-text and padding tokens and a plain
        chat template; it adds no special tokens by itself.

    Raises:
        ValueError: `vocab_size` leaves no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 258:
        raise ValueError(f"vocab_size: got {vocab_size}, wanted at least 258")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_PAD,
        chat_template=_CHAT_TEMPLATE,
    )


class _Encoder:
    def __init__(self, tokenizer: Any, max_length: int, max_prompt_length: int) -> None:
        if not 0 < max_prompt_length < max_length:
            raise ValueError(
                f"max_prompt_length: got {max_prompt_length}, wanted 1..{max_length - 1}, "
                f"below max_length = {max_length}"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: got eos_token_id None, wanted an end-of-text token")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.eos = tokenizer.eos_token_id
        self.bos = getattr(tokenizer, "bos_token_id", None)
        # Having a beginning-of-text token is not using it: GPT-2 and Qwen have one and do not.
        first = list(tokenizer.encode("", add_special_tokens=True)[:1])
        self.prefix: Ids = first if first == [self.bos] else []

    def encode(self, prompt: Any, completion: Any, where: str) -> tuple[Ids, Ids]:
        """Token ids of a prompt and its completion; `where` names the row for errors."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._text(prompt, completion)
        if _is_chat(prompt) and _is_chat(completion):
            return self._chat(prompt, completion, where)
        raise ValueError(
            f"completion: got {type(completion).__name__} with a prompt of "
            f"{type(prompt).__name__} in {where}, wanted two strings or two lists of messages"
        )

    def fit(self, prompt: Ids, completion: Ids) -> tuple[Ids, Ids]:
        """The same within the lengths."""
        if len(prompt) > self.max_prompt_length:
            kept = [self.bos] if self.bos is not None and prompt[0] == self.bos else []
            rest = self.max_prompt_length - len(kept)
            prompt = kept + prompt[len(prompt) - rest :]
        return prompt, completion[: self.max_length - len(prompt)]

    def _text(self, prompt: str, completion: str) -> tuple[Ids, Ids]:
        start, end = self._ids(prompt), self._ids(completion)
        if self.prefix and start[:1] != self.prefix:
            start = self.prefix + start
        return start, end if end[-1:] == [self.eos] else [*end, self.eos]

    def _ids(self, text: str) -> Ids:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _chat(self, prompt: Any, completion: Any, where: str) -> tuple[Ids, Ids]:
        template = self.tokenizer.apply_chat_template
        # `return_dict` defaults to another value in each major version of transformers.
        start = list(template(prompt, tokenize=True, add_generation_prompt=True, return_dict=False))
        whole = list(template([*prompt, *completion], tokenize=True, return_dict=False))
        if whole[: len(start)] != start or len(whole) == len(start):
            raise ValueError(
                "prompt: with the chat template's generation prompt it is not a proper prefix of "
                f"the whole chat: {self.tokenizer.decode(start)!r} against "
                f"{self.tokenizer.decode(whole)!r} in {where}; use a template that renders a"
                " prompt alone as it does before an answer"
            )
        return start, whole[len(start) :]


def _is_chat(turns: Any) -> bool:
    return isinstance(turns, Iterable) and not isinstance(turns, str | Mapping)

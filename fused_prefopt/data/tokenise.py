"""Text and chat records turned into token ids, with TRL's column names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fused_prefopt.data.columns import (
    LABELS,
    PAIR,
    RATINGS,
    SCORES,
    column_of,
    finite_number,
    has_values,
    judgement,
    require_columns,
    row_at,
    whole_number,
)
from fused_prefopt.data.truncation import RowCounts

Ids = list[int]
Record = Mapping[str, Any]
Features = list[dict[str, Any]]


def tokenise_pairs(
    records: Iterable[Record], tokenizer: Any, max_length: int, max_prompt_length: int
) -> Features:
    """Turn preference pairs into token ids.

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
            both are there.
        tokenizer: has `encode(text, add_special_tokens=...)` and `eos_token_id`; for chats
            `apply_chat_template`. Hugging Face tokenizers do.
        max_length: tokens of prompt and completion together.
        max_prompt_length: tokens of the prompt, fewer than `max_length`, so that a completion
            always keeps one.

    Returns:
        One dict a pair that is kept: `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int),
        and the scores as floats.

    Raises:
        ValueError: a length does not fit, a column is missing, a score is no finite number, the
            tokenizer has no end-of-text token, a chat's prompt is not a prefix of the whole chat,
            or no pair is left.
    """
    features, counts = counted_pairs(records, tokenizer, max_length, max_prompt_length)
    counts.log()
    return features


def tokenise_points(
    records: Iterable[Record], tokenizer: Any, max_length: int, max_prompt_length: int
) -> Features:
    """Turn rated completions into token ids, the way `tokenise_pairs` does.

    Args:
        records: with `prompt` and `completion`, both strings or both lists of messages; kept if
            present are `group`, the first of `reward`, `score` and `rating` that has values, and
            the first of `desirable` and `label`.
        tokenizer: as for `tokenise_pairs`.
        max_length: tokens of prompt and completion together.
        max_prompt_length: tokens of the prompt, fewer than `max_length`.

    Returns:
        One dict a completion that is kept: `prompt_ids`, `completion_ids` (lists of int),
        `reward` (float), `group` (int), `desirable` (bool).

    Raises:
        ValueError: as for `tokenise_pairs`; a group is no integer, or a label neither a bool nor
            0 or 1.
    """
    features, counts = counted_points(records, tokenizer, max_length, max_prompt_length)
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
        require_columns(record, ("prompt", *PAIR), where)
        whole = [encoder.encode(record["prompt"], record[side], where) for side in PAIR]
        cut = [encoder.fit(*side) for side in whole]
        scores = {}
        if has_values(record, SCORES):
            scores = {name: finite_number(name, record[name], where) for name in SCORES}
        if counts.keeps(whole, cut):
            (prompt, chosen), (_, rejected) = cut
            ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
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
        "reward": (column_of(records, RATINGS), finite_number),
        "group": ("group", whole_number),
        "desirable": (column_of(records, LABELS), judgement),
    }
    features = []
    for index, record in enumerate(records):
        where = row_at(index)
        require_columns(record, ("prompt", "completion"), where)
        whole = encoder.encode(record["prompt"], record["completion"], where)
        prompt, completion = encoder.fit(*whole)
        extras = {
            name: read(source, record[source], where)
            for name, (source, read) in sources.items()
            if source is not None and record.get(source) is not None
        }
        if counts.keeps([whole], [(prompt, completion)]):
            features.append({"prompt_ids": prompt, "completion_ids": completion, **extras})
    counts.require_some("records")
    return features, counts


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

"""Text and chat records turned into token ids, with TRL's column names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fused_prefopt.data.columns import has_values, require_columns

Ids = list[int]
_SCORES = ("score_chosen", "score_rejected")


def tokenise_pairs(
    records: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int, max_prompt_length: int
) -> list[dict[str, Any]]:
    """Turn preference pairs into token ids.

    Texts are encoded on their own, the prompt after the tokenizer's beginning-of-text token if it
    uses one, each completion before its end-of-text token. Chats go through the chat template,
    which decides how a turn ends; the completion is what the whole chat has after the prompt.
    Prompts lose tokens from the left (never the beginning-of-text token), completions from the
    right, the end-of-text token first.

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
        One dict a record: `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int), and the
        scores as floats.

    Raises:
        ValueError: a length does not fit, a column is missing, the tokenizer has no end-of-text
            token, or a chat's prompt is not a prefix of the whole chat.
    """
    encoder = _Encoder(tokenizer, max_length, max_prompt_length)
    features = []
    for record in records:
        require_columns(record, ("prompt", "chosen", "rejected"))
        prompt, chosen = encoder.encode(record["prompt"], record["chosen"])
        _, rejected = encoder.encode(record["prompt"], record["rejected"])
        feature: dict[str, Any] = {
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
        }
        if has_values(record, _SCORES):
            feature |= {name: float(record[name]) for name in _SCORES}
        features.append(feature)
    return features


def tokenise_points(
    records: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int, max_prompt_length: int
) -> list[dict[str, Any]]:
    """Turn rated completions into token ids, the way `tokenise_pairs` does.

    Args:
        records: with `prompt` and `completion`, both strings or both lists of messages; `reward`,
            `group` and `desirable` are kept if present.
        tokenizer: as for `tokenise_pairs`.
        max_length: tokens of prompt and completion together.
        max_prompt_length: tokens of the prompt, fewer than `max_length`.

    Returns:
        One dict a record: `prompt_ids`, `completion_ids` (lists of int), `reward` (float),
        `group` (int), `desirable` (bool).

    Raises:
        ValueError: as for `tokenise_pairs`.
    """
    encoder = _Encoder(tokenizer, max_length, max_prompt_length)
    kept = {"reward": float, "group": int, "desirable": bool}
    features = []
    for record in records:
        require_columns(record, ("prompt", "completion"))
        prompt, completion = encoder.encode(record["prompt"], record["completion"])
        extras = {
            name: cast(record[name]) for name, cast in kept.items() if record.get(name) is not None
        }
        features.append({"prompt_ids": prompt, "completion_ids": completion, **extras})
    return features


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

    def encode(self, prompt: Any, completion: Any) -> tuple[Ids, Ids]:
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError(
                f"completion: got {type(completion).__name__} with a prompt of "
                f"{type(prompt).__name__}, wanted two strings or two lists of messages"
            )
        ids = self._text if isinstance(prompt, str) else self._chat
        return self._fit(*ids(prompt, completion))

    def _text(self, prompt: str, completion: str) -> tuple[Ids, Ids]:
        start, end = self._ids(prompt), self._ids(completion)
        if self.prefix and start[:1] != self.prefix:
            start = self.prefix + start
        return start, end if end[-1:] == [self.eos] else [*end, self.eos]

    def _ids(self, text: str) -> Ids:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _chat(self, prompt: Any, completion: Any) -> tuple[Ids, Ids]:
        template = self.tokenizer.apply_chat_template
        # `return_dict` defaults to another value in each major version of transformers.
        start = list(template(prompt, tokenize=True, add_generation_prompt=True, return_dict=False))
        whole = list(template([*prompt, *completion], tokenize=True, return_dict=False))
        if whole[: len(start)] != start or len(whole) == len(start):
            raise ValueError(
                "prompt: with the chat template's generation prompt it is not a proper prefix of "
                f"the whole chat: {self.tokenizer.decode(start)!r} against "
                f"{self.tokenizer.decode(whole)!r}"
            )
        return start, whole[len(start) :]

    def _fit(self, prompt: Ids, completion: Ids) -> tuple[Ids, Ids]:
        if len(prompt) > self.max_prompt_length:
            kept = [self.bos] if self.bos is not None and prompt[0] == self.bos else []
            rest = self.max_prompt_length - len(kept)
            prompt = kept + prompt[len(prompt) - rest :]
        return prompt, completion[: self.max_length - len(prompt)]
